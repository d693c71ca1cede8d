"""Benchmarks: synthetic checkpoint families, peers, the floor, and their timing side by side."""
