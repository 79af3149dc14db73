"""Attackers who know the filter: what passes it, what a dataset check sees, and what a student learns of it."""
