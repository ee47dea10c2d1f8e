"""From TOML to a checked Recipe, and the lock beside it."""
