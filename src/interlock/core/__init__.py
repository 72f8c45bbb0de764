"""The rules: values and functions, and the only place where policy is decided.

Nothing happens here. No clock, no input or output, no randomness, no logging: time, ids and the policy are arguments,
so that a test can walk the whole space. Only the standard library and msgspec may be imported.
"""
