"""The subcommands of `interlock policy`."""
