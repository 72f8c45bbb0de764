"""Every operation proved on a real guest: what it did, how long it took, and what a crash in each phase leads to.

`python -m interlock.testing.proof` draws docs/reference/operations.md; the tests go through the same scenarios.
"""
