"""Application services: requests, instances, images, volumes, hosts, policies and tokens.

The HTTP API calls only this package. It authorizes callers and validates input; whether an operation is allowed in a
state is decided by the gate (`core.admission`) alone.
"""
