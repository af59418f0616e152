"""Measures and explains: evaluation, benchmarks, diagnosis, traces."""
