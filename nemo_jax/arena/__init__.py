"""The arena: methods compared at equal numbers of evaluations."""
