"""Bit-widths, codes, quantization ranges, and banks of them."""
