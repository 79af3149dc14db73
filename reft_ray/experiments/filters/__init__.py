"""Baseline filters, compared with the Ref-Teacher on the same rows."""
