"""The OpenAI-compatible HTTP face; knows neither ray nor torch."""
