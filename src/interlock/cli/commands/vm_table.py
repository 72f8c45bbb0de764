"""Text about VMs: the table of `interlock vm list`, with the columns that fit, and the hints of `vm show`."""

from __future__ import annotations

import shutil
import sys
from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any, Final, NamedTuple

import click

from interlock.api.schemas.responses import Due, Instance, Size
from interlock.cli.context import Cell, Invocation
from interlock.cli.output.formatting import STATE_COLOURS, age, clock, humanize, seconds_of
from interlock.core.operations import Operation
from interlock.core.records import Status
from interlock.core.states import NO_TASK, PowerState, VmState
from interlock.ports import HostState

USER_NETWORK_ADDRESS: Final = "10.0.2.15"
"""Address of every guest's first interface in QEMU's user network; reachable only by forwards."""


class Column(NamedTuple):
    """A column: title, cell text and sort key."""

    title: str
    text: Callable[[Instance, float | None], str]
    key: Callable[[Instance], Any]
    shown: int = 0
    """Columns with the highest numbers are left out first if they do not fit; 0: shown only by `--columns`."""


def power_text(one: Instance) -> str:
    """Return the power state, with the trouble of its host or guest."""
    if one.host_state is not HostState.UP:
        return f"{one.power_state.value} (host {one.host_state.value})"
    if one.guest_trouble is None:
        return one.power_state.value
    return f"{one.power_state.value} ({humanize(one.guest_trouble)})"


def _waiting(one: Instance) -> int:
    return len(one.held) + sum(request.status is Status.QUEUED for request in one.outstanding)


def _protected(one: Instance) -> str:
    return ", ".join(humanize(operation) for operation in one.blocked_operations)


def forwards_text(one: Instance) -> str:
    """Return the forwards of a VM."""
    return ", ".join(
        f"{pair.host_address}:{pair.host_port} -> {pair.guest_port}{'/udp' if pair.protocol == 'udp' else ''}"
        for pair in one.forwards
    )


def _networks(one: Instance) -> str:
    return ", ".join(each.network for each in (one.primary, *one.interfaces) if each is not None and each.network)


def _addresses(one: Instance) -> str:
    """Return what is leased to the VM."""
    leased = [address for each in (one.primary, *one.interfaces) if each is not None for address in each.addresses]
    return ", ".join(leased) or (USER_NETWORK_ADDRESS if one.primary is None else "")


def _size(one: Instance) -> str:
    memory = f"{one.memory_mib / 1024:g} GiB" if one.memory_mib % 512 == 0 else f"{one.memory_mib} MiB"
    return f"{one.vcpus} x {memory}" + (f", {one.root_gib} GiB disk" if one.root_gib else "")


def _image(one: Instance) -> str:
    return "" if one.image is None else one.image.name


COLUMNS: Final[dict[str, Column]] = {
    "name": Column("NAME", lambda one, _: one.name, lambda one: one.name, 1),
    "state": Column("STATE", lambda one, _: one.vm_state.value, lambda one: one.vm_state.value, 1),
    "task": Column(
        "TASK", lambda one, _: "" if one.task_state == NO_TASK else one.task_state, lambda one: one.task_state, 1
    ),
    "power": Column("POWER", lambda one, _: power_text(one), power_text, 1),
    "waiting": Column("WAITING", lambda one, _: str(_waiting(one) or ""), _waiting, 4),
    "size": Column("SIZE", lambda one, _: _size(one), lambda one: (one.vcpus, one.memory_mib, one.root_gib), 3),
    "network": Column("NETWORK", lambda one, _: _networks(one), _networks, 5),
    "address": Column("ADDRESS", lambda one, _: _addresses(one), _addresses, 3),
    "forwards": Column("FORWARDS", lambda one, _: forwards_text(one), forwards_text, 2),
    "host": Column("HOST", lambda one, _: one.host, lambda one: one.host, 2),
    "project": Column("PROJECT", lambda one, _: one.project, lambda one: one.project),
    "image": Column("IMAGE", lambda one, _: _image(one), _image, 6),
    "protected": Column("PROTECTED FROM", lambda one, _: _protected(one), _protected, 5),
    "tags": Column("TAGS", lambda one, _: ", ".join(one.tags), lambda one: one.tags),
    "changed": Column(
        "LAST CHANGE", lambda one, now: age(one.updated_at, now), lambda one: -seconds_of(one.updated_at), 4
    ),
    "created": Column("AGE", lambda one, now: age(one.created_at, now), lambda one: -seconds_of(one.created_at)),
    "id": Column("ID", lambda one, _: one.id, lambda one: one.id, 8),
}
_LAST_LEFT_OUT: Final = 8
_GAP: Final = 2


class ColumnNames(click.ParamType[tuple[str, ...]]):
    """Comma-separated column names."""

    name = "columns"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> tuple[str, ...]:
        if isinstance(value, tuple):
            return value
        names = tuple(dict.fromkeys(word.strip().lower() for word in str(value).split(",") if word.strip()))
        for name in names:
            if name not in COLUMNS:
                self.fail(f"Unknown column {name!r}. Columns: {', '.join(COLUMNS)}.", param, ctx)
        if not names:
            self.fail(f"Name at least one column. Columns: {', '.join(COLUMNS)}.", param, ctx)
        return names


class SortKey(click.ParamType[str]):
    """The name of a column, with a leading hyphen for reverse order."""

    name = "column"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> str:
        text = str(value).strip().lower()
        if text.removeprefix("-") not in COLUMNS:
            self.fail(f"Unknown column {value!r}. Columns: {', '.join(COLUMNS)}.", param, ctx)
        return text


def sort(rows: list[Instance], by: str | None) -> list[Instance]:
    """Sort rows by a column (stable)."""
    if by is None:
        return rows
    return sorted(rows, key=COLUMNS[by.removeprefix("-")].key, reverse=by.startswith("-"))


def print_table(
    invocation: Invocation, rows: Sequence[Instance], names: tuple[str, ...] | None, *, all_projects: bool
) -> None:
    """Print the rows with the given columns; by default as many as fit on the terminal."""
    now = invocation.client.now
    texts = {name: [column.text(one, now) for one in rows] for name, column in COLUMNS.items()}
    named = names or _fitting_columns(texts, all_projects=all_projects)
    invocation.table(
        [COLUMNS[name].title for name in named],
        ([_cell(name, texts[name][row], one) for name in named] for row, one in enumerate(rows)),
    )


def _cell(name: str, text: str, one: Instance) -> Cell:
    match name:
        case "state":
            colour = STATE_COLOURS.get(one.vm_state.value)
        case "power":
            colour = None if one.guest_trouble is None else "red"
        case _:
            colour = None
    return Cell(text or "-", colour)


def _fitting_columns(texts: dict[str, list[str]], *, all_projects: bool) -> tuple[str, ...]:
    """Return the non-empty columns, as many as fit on the terminal."""
    named = [
        name
        for name, column in COLUMNS.items()
        if (column.shown and any(texts[name])) or (name == "project" and all_projects)
    ]
    if sys.stdout.isatty():
        room = shutil.get_terminal_size().columns
        for number in range(_LAST_LEFT_OUT, 1, -1):
            if _width(named, texts) <= room:
                break
            named = [name for name in named if COLUMNS[name].shown < number]
    return tuple(named)


def _width(named: Sequence[str], texts: dict[str, list[str]]) -> int:
    widths = (max(len(COLUMNS[name].title), *map(len, texts[name])) for name in named)
    return sum(widths) + _GAP * (len(named) - 1)


_STEPS: Final = {
    VmState.BUILDING: "`vm start` builds and boots it",
    VmState.PAUSED: "`vm unpause` continues it",
    VmState.SUSPENDED: "`vm resume` restores its memory and continues it",
    VmState.RESCUED: "`vm unrescue` boots its own disk",
    VmState.RESIZED: "`vm confirm-resize` keeps the new size, `vm revert-resize` restores the old one",
    VmState.SHELVED: "`vm unshelve` restores it, `vm offload` frees its resources on the host",
    VmState.SHELVED_OFFLOADED: "`vm unshelve` restores it",
    VmState.SOFT_DELETED: "`vm restore` undeletes it",
    VmState.ERROR: "`vm reboot --hard` retries, `vm rebuild` recreates its root disk; `interlock why` lists all",
}
_DUE: Final = {
    Operation.CONFIRM_RESIZE: "confirmed",
    Operation.DELETE: "deleted permanently",
    Operation.SHELVE_OFFLOAD: "offloaded",
    Operation.START: "started again",
    Operation.STOP: "stopped",
}


def next_steps(one: Instance, now: float | None) -> str | None:
    """Return the hints; None while an operation is outstanding, or if there are none."""
    if one.host_state is HostState.FENCED and one.vm_state is not VmState.DELETED:
        return None if one.outstanding else "`vm evacuate` rebuilds it on another host"
    parts = [] if one.outstanding or one.vm_state not in _STEPS else [_STEPS[one.vm_state]]
    if parts and one.vm_state is VmState.RESIZED and one.power_state is not PowerState.RUNNING:
        parts.append("`vm start` boots it with its new size, and confirms that")
    if one.due is not None:
        parts.append(_due(one.due, now))
    return "; ".join(parts) or None


def _due(due: Due, now: float | None) -> str:
    done = _DUE.get(due.operation, f"{due.operation.value} submitted")
    return f"{done} automatically at {clock(due.at, now)}"


def size_text(one: Instance | Size) -> str:
    """Return the vCPUs, memory and root disk of a size."""
    processors = f"{one.vcpus} vcpu" + ("" if one.vcpus == 1 else "s")
    disk = f", root disk {one.root_gib} GiB" if one.root_gib else ""
    return f"{processors}, {one.memory_mib} MiB memory{disk}"


def state_text(one: Instance) -> str | None:
    """Return the earlier states that can be restored."""
    if one.prior_vm_state is None:
        return None
    states = (one.vm_state, one.prior_vm_state, *one.further_vm_states)
    if VmState.RESIZED in states:
        states = states[: states.index(VmState.RESIZED) + 2]  # earlier states are those of the present guest
    return "; ".join(f"{before.value}, before it was {state.value}" for state, before in pairwise(states))
