"""The stores of instances, requests, events and the other records, and their clock. A store decides nothing.

The names in `__all__` are for programs that keep the records of `interlock.core` themselves: a clock on which ages are
measured. docs/guides/embed-the-gate.md shows how.
"""

from interlock.stores.clock import ClockState, StoreClock, SystemClock

__all__ = ["ClockState", "StoreClock", "SystemClock"]
