"""Experience, contexts, windows, tokenizers and the raw files of data sets."""
