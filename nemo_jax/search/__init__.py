"""The search: problems, species, and the generation that joins them."""
