"""The loss over logits that a head makes a chunk of tokens at a time."""
