"""Tasks as search problems; so far mixed-precision quantization."""
