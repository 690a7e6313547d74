"""Turns text and generated tasks into batches: files, tokenizers, the order of tokens, loaders that resume exactly.

`data.build` constructs everything from a config; the other modules receive what they need ready-made.
"""
