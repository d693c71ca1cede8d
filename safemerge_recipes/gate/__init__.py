"""Gate: what is measured of an update, and which tensors are therefore merged."""
