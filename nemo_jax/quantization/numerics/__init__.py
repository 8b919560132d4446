"""Bit-widths, grids, ranges, and the banks that hold them."""
