"""Finetuning as a service that stays safe: Ref-Teacher filtering and guided finetuning on Ray."""
