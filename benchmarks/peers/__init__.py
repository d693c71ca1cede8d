"""What the engine is compared with: PEFT's merge, the gate written out densely, copying the bytes."""
