"""The method: refusal feature, verdicts, losses and the two training stages; torch and the standard library only."""
