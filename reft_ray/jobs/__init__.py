"""Finetuning jobs as records, transitions and files."""
