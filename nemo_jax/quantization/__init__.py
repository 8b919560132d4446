"""Quantization of neural networks as a transformation of functions."""
