"""Benchmarks: synthetic checkpoint families, the peers, the floor, and the program that times them side by side."""
