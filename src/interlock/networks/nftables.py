"""Own tables of nftables: their content as values, the difference of two as one transaction, and the program `nft`.

Source: libnftables-json(5).
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from typing import Any, Final

import msgspec

from interlock.core.errors import OperationRejected
from interlock.networks import host_programs

NFT: Final = "nft"
_TRIES: Final = 4
_RETRY_S: Final = 0.05
_BUSY: Final = ("Device or resource busy", "Interrupted system call", "Resource temporarily unavailable")

Expression = Mapping[str, Any]
Rule = tuple[Expression, ...]

ACCEPT: Final[Expression] = {"accept": None}
DROP: Final[Expression] = {"drop": None}


class Hook(msgspec.Struct, frozen=True, kw_only=True):
    """Where the kernel calls a chain."""

    type: str = "filter"
    hook: str
    prio: int


class Chain(msgspec.Struct, frozen=True, kw_only=True):
    """A chain."""

    rules: tuple[Rule, ...]
    hook: Hook | None = None
    """None: it is called by other chains, or by a verdict map."""


class NamedSet(msgspec.Struct, frozen=True, kw_only=True):
    """A set, or a map to chains."""

    type: str | tuple[str, ...]
    elements: Mapping[str, str | None] = {}
    """Each element, and the chain to which it leads; None in a set."""
    is_map: bool = False
    grows: bool = False
    """Whether rules add elements, which expire; then it has none of ours."""

    @property
    def kind(self) -> str:
        """What nftables calls it."""
        return "map" if self.is_map else "set"


class Table(msgspec.Struct, frozen=True, kw_only=True):
    """The content of a table."""

    chains: Mapping[str, Chain]
    sets: Mapping[str, NamedSet]


def match(left: Expression, right: Any, op: str = "==") -> Expression:
    """Return the expression that compares a field or key."""
    return {"match": {"op": op, "left": left, "right": right}}


def field(protocol: str, name: str) -> Expression:
    """Return the expression of a header's field."""
    return {"payload": {"protocol": protocol, "field": name}}


def meta(key: str) -> Expression:
    """Return the expression of a property of the packet."""
    return {"meta": {"key": key}}


def prefix(address: str, length: int) -> Expression:
    """Return the expression of a range of addresses."""
    return {"prefix": {"addr": address, "len": length}}


def one_of(values: Sequence[Any]) -> Expression:
    """Return the expression of an anonymous set."""
    return {"set": list(values)}


def by_map(key: Expression, name: str) -> Rule:
    """Return the rule that calls the chain to which a verdict map leads, if it has an element."""
    return ({"vmap": {"key": key, "data": f"@{name}"}},)


def changes(family: str, name: str, before: Table | None, after: Table | None) -> list[dict[str, Any]]:
    """Return the commands of the transaction that turns a table into another.

    Args:
        family: of the table.
        name: of the table.
        before: None: unknown, also whether it exists.
        after: None: there is to be none.
    """
    table = {"family": family, "name": name}
    commands: list[dict[str, Any]] = []
    if before is None:
        commands += [{"add": {"table": table}}, {"delete": {"table": table}}]
        before = Table(chains={}, sets={})
        commands += [] if after is None else [{"add": {"table": table}}]
    elif after is None:
        return [{"delete": {"table": table}}]
    if after is not None:
        commands += _difference({"family": family, "table": name}, before, after)
    return commands


def _difference(where: dict[str, str], before: Table, after: Table) -> list[dict[str, Any]]:
    """Return commands in an order in which nothing refers to what is missing."""

    def named(verb: str, kind: str, name: str, **more: Any) -> dict[str, Any]:
        return {verb: {kind: {**where, "name": name, **more}}}

    none = NamedSet(type="")
    same = {name for name, chain in after.chains.items() if before.chains.get(name) is chain}
    changed = [name for name, chain in after.chains.items() if name not in same and before.chains.get(name) != chain]
    removed = [name for name in before.chains if name not in after.chains]
    gone = {name: _beyond(old, after.sets[name]) for name, old in before.sets.items() if name in after.sets}
    more = {name: _beyond(new, before.sets.get(name, none)) for name, new in after.sets.items()}
    rules = [(name, rule) for name in changed for rule in after.chains[name].rules]
    return [
        *(named("delete", "element", name, elem=elements) for name, elements in gone.items() if elements),
        *(_declaration(where, name, new) for name, new in after.sets.items() if name not in before.sets),
        *(named("add", "chain", name, **_hook(after.chains[name])) for name in changed if name not in before.chains),
        *(named("flush", "chain", name) for name in changed if name in before.chains),
        *({"add": {"rule": {**where, "chain": name, "expr": rule}}} for name, rule in rules),
        *(named("add", "element", name, elem=elements) for name, elements in more.items() if elements),
        *(named("flush", "chain", name) for name in removed),
        *(named("delete", old.kind, name) for name, old in before.sets.items() if name not in after.sets),
        *(named("delete", "chain", name) for name in removed),
    ]


def _beyond(of: NamedSet, other: NamedSet) -> list[Any]:
    """Return the elements that the other set does not have, or that lead elsewhere there."""
    keys = sorted(key for key, target in of.elements.items() if other.elements.get(key, "") != target)
    return [[key, {"jump": {"target": of.elements[key]}}] if of.is_map else key for key in keys]


def _declaration(where: dict[str, str], name: str, new: NamedSet) -> dict[str, Any]:
    kind = list(new.type) if isinstance(new.type, tuple) else new.type
    declared: dict[str, Any] = {**where, "name": name, "type": kind}
    if new.grows:
        # Full, it takes no more until elements expire: a guest that fills its own harms only itself.
        declared |= {"flags": ["timeout"], "size": 16_384}
    return {"add": {new.kind: {**declared, **({"map": "verdict"} if new.is_map else {})}}}


def _hook(chain: Chain) -> dict[str, Any]:
    return {} if chain.hook is None else {**msgspec.structs.asdict(chain.hook), "policy": "accept"}


async def apply(commands: Sequence[Mapping[str, Any]]) -> None:
    """Perform commands in one transaction, again while nftables is busy.

    Raises:
        OperationRejected: nothing was changed.
    """
    text = msgspec.json.encode({"nftables": commands})
    status, output, errors = 1, "", ""
    for tried in range(_TRIES):
        status, output, errors = await host_programs.run([host_programs.installed(NFT), "-j", "-f", "-"], text)
        if status == 0:
            return
        if not any(busy in errors for busy in _BUSY):
            break
        await asyncio.sleep(_RETRY_S * 2**tried)
    lines = [line for line in (errors or output).splitlines() if line.strip()]
    raise OperationRejected(
        f"nftables rejected the rules of networks: {lines[0] if lines else f'nft exited with {status}'}.",
        remedy="See that the server may administer the network (CAP_NET_ADMIN), and that the kernel has nf_tables.",
    )


async def exists(family: str, name: str) -> bool:
    """Whether a table exists; False too where nftables cannot be used."""
    program = host_programs.find(NFT)
    return program is not None and (await host_programs.run([program, "-t", "list", "table", family, name]))[0] == 0


async def is_changed(family: str, name: str, applied: Table) -> bool:
    """Whether somebody has changed the rules of a table since it was applied: their number in each chain is another."""
    return await _rule_counts(family, name) != {name: len(chain.rules) for name, chain in applied.chains.items()}


async def _rule_counts(family: str, name: str) -> dict[str, int]:
    """Return how many rules each chain of a table has; empty if there is no such table."""
    words = [host_programs.installed(NFT), "-j", "-t", "list", "table", family, name]
    status, output, _ = await host_programs.run(words)
    found: dict[str, int] = {}
    for listed in msgspec.json.decode(output)["nftables"] if status == 0 else ():
        if chain := listed.get("chain"):
            found.setdefault(chain["name"], 0)
        if rule := listed.get("rule"):
            found[rule["chain"]] = found.get(rule["chain"], 0) + 1
    return found
