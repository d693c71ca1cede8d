"""Experiments: many plans of one family, scored."""
