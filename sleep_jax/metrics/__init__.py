"""Costs, goodput, continual-learning metrics, statistics and writers."""
