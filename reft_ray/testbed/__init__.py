"""A synthetic dataset and a tiny base model, so that a first run needs no download."""
