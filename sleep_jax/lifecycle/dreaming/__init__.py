"""Dreaming: the model improves on what it makes up (Sleep section 6)."""
