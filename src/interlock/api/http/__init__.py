"""HTTP itself: routes, request parsing, problem details, uploads, disconnects, and the OpenAPI document."""
