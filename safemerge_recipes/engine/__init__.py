"""Engine: carries a graph out and makes the output folder."""
