"""QMP connections: commands and events."""
