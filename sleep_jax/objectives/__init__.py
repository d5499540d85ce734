"""Losses, divergences, rewards and policy gradients: pure functions."""
