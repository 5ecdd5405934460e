"""Readers of tokenizer formats other than tokenizer.json; each returns the tokenizer as JSON to be."""
