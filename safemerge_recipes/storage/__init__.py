"""Storage: bytes on disk, read and written; knows no model."""
