"""The HTTP API: routes, request parsing, wire types and error responses. Calls `service` only."""
