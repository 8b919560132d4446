"""Post-training quantization: better codes and ranges than rounding."""
