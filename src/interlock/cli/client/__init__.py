"""The HTTP client of the command line: requests, event streams, WebSockets, uploads."""
