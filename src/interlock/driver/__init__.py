"""State drivers: one task per instance that takes what was admitted, performs it on the hypervisor, and reports.

Which request may be served when is the core's; how an operation is performed is in `operations/`; this package brings
the two together and keeps the book of it at a single exit.
"""
