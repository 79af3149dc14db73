"""The built-in world for an offline first run: grammar, rows and a tiny base model."""
