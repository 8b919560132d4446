"""Post-training quantization: codes and ranges better than plain rounding."""
