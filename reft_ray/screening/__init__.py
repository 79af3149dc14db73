"""Ray Data: reading, validating and screening datasets into kept, quarantined and invalid rows."""
