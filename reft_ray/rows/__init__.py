"""Dataset rows: the one reader of a chat row for HTTP, screening and training; no ray, no torch, no pyarrow."""
