"""The operators behind the losses, and the registry that chooses who runs them."""
