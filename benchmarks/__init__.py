"""Timed comparisons, run by hand from the root: `python -m benchmarks.NAME`; see README.md."""
