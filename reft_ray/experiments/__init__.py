"""Experiments that run the whole method: the quickstart and the comparison of methods."""
