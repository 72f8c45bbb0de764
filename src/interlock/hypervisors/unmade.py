# ruff: noqa: ARG002 - it answers all alike
"""What no adapter does yet: each method here says so, and goes as soon as both adapters have it."""

from __future__ import annotations

from pathlib import Path

from interlock.core.errors import Refused
from interlock.core.records import Spec
from interlock.ports import Permit, Report, Stream


class Unmade:
    """Refuses what is not made yet."""

    async def save_memory(self, permit: Permit, instance_id: str, report: Report) -> None:
        raise _unmade()

    async def restore_memory(self, permit: Permit, instance_id: str, spec: Spec, report: Report) -> None:
        raise _unmade()

    async def forget_memory(self, permit: Permit, instance_id: str) -> None:
        raise _unmade()

    async def dump_memory(self, permit: Permit, instance_id: str, target: Path, report: Report) -> None:
        raise _unmade()

    async def agent_answers(self, instance_id: str) -> bool:
        raise _unmade()

    async def ask_shutdown(self, permit: Permit, instance_id: str) -> None:
        raise _unmade()

    async def set_password(self, permit: Permit, instance_id: str, user: str, password: str) -> None:
        raise _unmade()

    async def screenshot(self, instance_id: str) -> bytes:
        raise _unmade()

    async def open_console(self, instance_id: str) -> Stream:
        raise _unmade()

    async def open_display(self, instance_id: str) -> Stream:
        raise _unmade()


def _unmade() -> Refused:
    return Refused("This adapter cannot do that yet.")
