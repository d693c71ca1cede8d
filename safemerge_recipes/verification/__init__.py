"""Verification: a finished folder against its manifest, its plan and the sources it was made of."""
