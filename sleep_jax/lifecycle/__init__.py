"""A life: its state, its clocks, its days and its nights."""
