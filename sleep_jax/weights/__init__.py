"""Checkpoints of other houses: how they come in, and how they go home."""
