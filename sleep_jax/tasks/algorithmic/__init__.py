"""Generated problems whose context is read window by window."""
