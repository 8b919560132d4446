"""What is claimed of speed, against others and in one run."""
