"""Mergekit: its files become recipes, and the gated merge becomes one of its methods."""
