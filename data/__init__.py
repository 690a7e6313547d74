"""Text and generated tasks into batches: files, tokenizers, the order of tokens, and loaders that resume exactly.

`data.build` makes all of it from a config; the other modules do not know of each other's construction.
"""
