"""Guards: second models next to the Ref-Teacher, local or on an endpoint, with their output formats."""
