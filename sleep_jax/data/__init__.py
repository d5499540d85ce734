"""Tokenizers and the raw files that real tasks read."""
