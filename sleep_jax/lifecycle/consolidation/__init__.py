"""Consolidation: knowledge moves from fast levels into slower ones at night."""
