"""What every hypervisor promises: one check for each sentence of `ports.Hypervisor`.

The author of an adapter writes a `HypervisorUnderTest` around it and runs every check of `CHECKS` with a fresh one:

    @pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
    async def test_conformance(check, under_test):
        await run(check, under_test)

A check ends without an error if the promise is kept. Nothing here may know an adapter, and no check may sleep: each
waits for what was promised, and `patience_s` is how long it may take.
"""

from conformance.hypervisor import faults, guest_io, interfaces, lifecycle, memory, root_disks
from conformance.hypervisor.harness import CHECKS, Bench, Check, GivenPermit, HypervisorUnderTest, Told, run

__all__ = [
    "CHECKS",
    "Bench",
    "Check",
    "GivenPermit",
    "HypervisorUnderTest",
    "Told",
    "faults",
    "guest_io",
    "interfaces",
    "lifecycle",
    "memory",
    "root_disks",
    "run",
]
