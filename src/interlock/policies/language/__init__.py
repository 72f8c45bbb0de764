"""The policy language: reading and validating policy files."""
