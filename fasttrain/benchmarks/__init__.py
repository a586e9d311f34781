"""Benchmarks, one per file; `common` has the code that they share."""
