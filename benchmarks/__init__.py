"""Benchmarks of speed, accuracy and robustness, some against other tools."""
