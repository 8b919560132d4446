"""Quantization as a function transformation."""
