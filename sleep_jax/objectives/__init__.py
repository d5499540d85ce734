"""Losses, divergences, rewards and policy gradients, as pure functions."""
