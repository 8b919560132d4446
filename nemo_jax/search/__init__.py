"""The search: problems, species, surrogates, and NEMO's generation."""
