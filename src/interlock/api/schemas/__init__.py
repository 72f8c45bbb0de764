"""The JSON documents of the API, one module per resource, and the functions that build them from records."""
