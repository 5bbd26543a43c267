"""Packed targets to ids and log-probabilities."""
