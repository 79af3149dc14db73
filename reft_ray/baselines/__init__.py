"""Defences by others: one small file each, with its equation and source; torch and `core` only."""
