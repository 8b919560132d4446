"""Methods side by side, at equal evaluations."""
