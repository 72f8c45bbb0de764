"""The command line: one function per command, and what they share.

It speaks to a server over HTTP like any other client; only `serve`, `demo`, `db` and `rehearse` do their work in this
process. Nothing here decides what is allowed. Whatever is slow to import is imported inside the command that needs it.
"""
