"""The safety adapter: rows to train on, the training itself, and which of several is kept."""
