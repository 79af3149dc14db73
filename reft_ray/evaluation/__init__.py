"""Judges, harmful score, task accuracy, over-refusal and the release gate."""
