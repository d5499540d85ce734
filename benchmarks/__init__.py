"""Speed against the field's usual tools; see `docs/benchmarks.md`."""
