"""Weights in and out: every file format that is read or written."""
