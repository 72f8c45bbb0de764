"""The schema migrations of the database."""

from __future__ import annotations

from typing import Final

from interlock.stores.migrations.versions import (
    r0001_beginning,
    r0002_policies,
    r0003_hosts,
    r0004_tallies,
    r0005_reserve,
    r0006_clock,
    r0007_lock_roles,
    r0008_walks,
    r0009_audit,
    r0010_projects,
    r0011_networks,
    r0012_security_groups,
)

STEPS: Final[dict[str, tuple[str, ...]]] = {
    "0001": r0001_beginning.STATEMENTS,
    "0002": r0002_policies.STATEMENTS,
    "0003": r0003_hosts.STATEMENTS,
    "0004": r0004_tallies.STATEMENTS,
    "0005": r0005_reserve.STATEMENTS,
    "0006": r0006_clock.STATEMENTS,
    "0007": r0007_lock_roles.STATEMENTS,
    "0008": r0008_walks.STATEMENTS,
    "0009": r0009_audit.STATEMENTS,
    "0010": r0010_projects.STATEMENTS,
    "0011": r0011_networks.STATEMENTS,
    "0012": r0012_security_groups.STATEMENTS,
}
"""The statements of each migration by revision, oldest first."""
