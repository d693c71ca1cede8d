"""The engine timed beside its peers and the floor, over synthetic checkpoint families."""
