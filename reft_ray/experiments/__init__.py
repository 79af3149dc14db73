"""Whole chains for people to run: the quickstart and the comparison of methods."""
