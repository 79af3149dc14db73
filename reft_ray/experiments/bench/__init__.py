"""The comparison with the baselines: one grid of cells, further sections beside it, one report made from both."""
