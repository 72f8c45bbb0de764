"""What every store promises: one check for each sentence of `ports.Store`.

The author of an adapter writes a `StoreUnderTest` around it and runs every check of `CHECKS` with a fresh one:

    @pytest.mark.parametrize("promise", CHECKS, ids=lambda promise: promise.__name__)
    async def test_conformance(promise, under_test):
        await run(promise, under_test)

A check ends without an error if the promise is kept. Nothing here may know an adapter, and no check may sleep.
"""

from conformance.store import hosts, inventory, keys_and_names, policies, queries, totals, transactions
from conformance.store.harness import CHECKS, Bench, Check, GivenClock, StoreUnderTest, run

__all__ = [
    "CHECKS",
    "Bench",
    "Check",
    "GivenClock",
    "StoreUnderTest",
    "hosts",
    "inventory",
    "keys_and_names",
    "policies",
    "queries",
    "run",
    "totals",
    "transactions",
]
