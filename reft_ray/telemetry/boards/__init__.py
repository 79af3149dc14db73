"""What each dashboard shows, one file per dashboard."""
