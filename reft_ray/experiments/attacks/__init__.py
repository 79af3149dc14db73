"""Attackers who know the filter: what passes it, which findings it raises, and what a student learns."""
