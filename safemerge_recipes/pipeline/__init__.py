"""Pipeline: the phases as one run, plain function calls from a recipe to a finished output."""
