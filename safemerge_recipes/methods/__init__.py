"""Methods: what a selected tensor becomes."""
