"""One run: build, the loop over days and nights, resume, report."""
