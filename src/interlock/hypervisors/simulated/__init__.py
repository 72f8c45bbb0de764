"""A hypervisor whose guests are records: the test double, and what load tests run against.

Only names are gathered here. `guest` is what is kept of one, `contents` what is on a disk, `storage` who has which,
`keeping` and `host` what can happen to them, `faults` what can go wrong and when; `calls` is how a call of the port
passes, and `adapter` the port, with `memory`, `root_disks` and `senses`. Nothing here may know what a request or a
policy is.
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
from interlock.hypervisors.simulated.guest import Guest
from interlock.hypervisors.simulated.host import SimulatedHost

__all__ = [
    "AnswerLost",
    "Fault",
    "FaultPlan",
    "FaultRates",
    "Guest",
    "GuestIgnores",
    "GuestPanics",
    "GuestVanishes",
    "Hangs",
    "Method",
    "Refuses",
    "SimulatedHost",
    "SimulatedHypervisor",
    "Slow",
]
