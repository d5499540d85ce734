"""How an experiment gets onto machines; the lowest floor is `job`."""
