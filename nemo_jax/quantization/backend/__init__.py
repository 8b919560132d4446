"""Quantized products in the form that is fastest where they run."""
