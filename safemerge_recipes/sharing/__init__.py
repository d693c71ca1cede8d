"""Sharing: recipes that travel, from folders and the hub, and to them."""
