"""Gradient training: one loop, its optimizers, Fisher information."""
