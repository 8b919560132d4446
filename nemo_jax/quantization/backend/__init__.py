"""Quantized products in the form that is fastest on each platform."""
