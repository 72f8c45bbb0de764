"""A soak: many real VMs on two hosts, random admitted operations, servers and agents that are killed, and troubles.

`run` is the whole of it; `ground` what it stands on, `asking` who asks, `killing` what is killed, `identities` who
wants a host's name besides, `troubles` what else goes wrong, `doubles` who watches that nothing runs twice, `judging`
what must be true at the end, and `book` where all of them write it down.
"""

from soak.run import Soak

__all__ = ["Soak"]
