"""A hypervisor whose guests are records: the test double, and the target of load tests.

`guest` is the record, `host` what can happen to it, `storage` and `disk_content` its disks, `faults` what can go wrong;
`watcher` delivers events, `calls` is how a call of the port runs, and `adapter` the port.
"""

from interlock.hypervisors.simulated.adapter import SimulatedHypervisor
from interlock.hypervisors.simulated.faults import (
    AnswerLost,
    Fault,
    FaultPlan,
    FaultRates,
    GuestIgnores,
    GuestPanics,
    GuestVanishes,
    Hangs,
    Method,
    Refuses,
    Slow,
)
from interlock.hypervisors.simulated.guest import SimulatedGuest
from interlock.hypervisors.simulated.host import SimulatedHost

__all__ = [
    "AnswerLost",
    "Fault",
    "FaultPlan",
    "FaultRates",
    "GuestIgnores",
    "GuestPanics",
    "GuestVanishes",
    "Hangs",
    "Method",
    "Refuses",
    "SimulatedGuest",
    "SimulatedHost",
    "SimulatedHypervisor",
    "Slow",
]
