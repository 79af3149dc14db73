"""Simple filters in the Ref-Teacher's place, measured on the same rows."""
