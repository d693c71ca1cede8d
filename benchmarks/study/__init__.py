"""The pre-registered study and the refusal matcher's confusion matrix: their runs and results."""
