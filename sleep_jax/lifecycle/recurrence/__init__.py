"""The other sleep: offline recurrence into fast weights (2605.26099)."""
