"""Executors: ways to carry a graph out."""
