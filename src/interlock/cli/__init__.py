"""The command line: an HTTP client of the server, and the commands that run a server or work on policies locally.

Modules that are slow to import are imported inside the command that needs them.
"""
