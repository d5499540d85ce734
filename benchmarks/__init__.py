"""Speed compared with other libraries; see `docs/benchmarks.md`."""
