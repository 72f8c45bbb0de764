"""A soak: many real VMs on two hosts, random admitted operations, and servers and agents that are killed.

`run` is the whole of it; `ground` what it stands on, `asking` who asks, `killing` what is killed, `doubles` who watches
that nothing runs twice, `judging` what must be true at the end, and `book` where all of them write it down.
"""

from interlock.testing.soak.run import Soak

__all__ = ["Soak"]
