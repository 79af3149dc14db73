"""The panels of each dashboard, one file per dashboard."""
