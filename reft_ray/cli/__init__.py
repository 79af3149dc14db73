"""The `reft-ray` command: one file per noun, heavy imports inside the commands."""
