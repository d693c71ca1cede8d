"""Plan: a line for every tensor of the output, and the graph of work that makes it."""
