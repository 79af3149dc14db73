"""Ray Train: both training stages across a cluster."""
