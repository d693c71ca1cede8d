"""Sources: folders and ids in, a family of models and adapters out."""
