"""State drivers: one task per instance that performs admitted requests on the hypervisor, and reports the outcome.

The core decides which request is performed when, and `operations/` has the handlers.
"""
