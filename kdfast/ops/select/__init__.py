"""The choice of soft targets: top-k, top-p and draws."""
