"""Evaluation: scores of models and what they say."""
