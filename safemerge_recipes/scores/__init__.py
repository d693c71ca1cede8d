"""Scores: a value for every element of the gated tensors, from weights or activations, for masks."""
