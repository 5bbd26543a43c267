"""The dense loss: a kernel that reads logits once and writes their gradient once."""
