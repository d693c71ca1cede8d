"""The merged update as a PEFT adapter on the aligned model, for `output.format: adapter`."""
