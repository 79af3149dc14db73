"""The comparison with the baselines: a grid of cells, further sections, and one report."""
