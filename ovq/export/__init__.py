"""Models in the format of Hugging Face's transformers: writing and reading their folders (`ovq.inference.export`)."""
