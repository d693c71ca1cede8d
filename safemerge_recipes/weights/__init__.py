"""Weights: symbolic sums of stored tensors and LoRA products, and their numbers."""
