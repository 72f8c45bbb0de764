"""Confinement of the processes that handle untrusted input: QEMU, qemu-img and the policy verifier.

`sandbox` builds their command lines, `host_users` gives each VM a user of its own.
"""
