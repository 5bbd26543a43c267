"""What is computed, in plain PyTorch: no module here knows a kernel."""
