"""Traces of functions, and the tensors in them that are quantized."""
