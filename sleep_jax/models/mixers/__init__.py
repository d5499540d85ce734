"""Sequence mixers, one file each; `base` has their interface."""
