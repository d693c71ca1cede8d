"""Peft: PEFT adapters as symbolic weights."""
