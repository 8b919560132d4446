"""Networks in Flax, whose submodules have the names that torchvision gives."""
