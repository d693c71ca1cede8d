"""Quantised: which tensors are one quantised weight, and what they are worth; one file a format."""
