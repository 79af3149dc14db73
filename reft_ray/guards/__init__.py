"""Guards: second models next to the Ref-Teacher, local or behind an endpoint, with their output formats."""
