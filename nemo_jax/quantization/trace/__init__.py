"""A function as a program, and what in it is quantized."""
