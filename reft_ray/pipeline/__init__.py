"""Composition: the steps of a finetuning job on the real screening, training and evaluation."""
