"""What keeps a run alive and accountable."""
