"""Sharding, checkpoints, multi-process runs, termination and profiling."""
