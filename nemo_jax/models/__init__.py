"""Networks in Flax, without weights; submodules go by torchvision's names."""
