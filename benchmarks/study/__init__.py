"""The study behind docs/evidence.md and the refusal matcher's confusion matrix: their runs, results and pages."""
