"""The loss over shards of a vocabulary that lie on several ranks."""
