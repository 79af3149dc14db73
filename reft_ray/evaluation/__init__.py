"""Judges of responses, harmful score, over-refusal, task accuracy and the release gate."""
