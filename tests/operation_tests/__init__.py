"""Every operation proved on a real guest: what it did, how long it took, and what a crash in each phase leads to.

`PYTHONPATH=tests python -m operation_tests` draws docs/reference/operations.md; the tests go through
the same scenarios.
"""
