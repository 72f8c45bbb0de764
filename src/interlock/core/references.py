"""What the parameters of each operation name: images, volumes, interfaces and hosts."""

from __future__ import annotations

from typing import Final

from interlock.core.operations import FIELDS, Operation
from interlock.core.parameters import Refers

REFERENCES: Final[dict[Operation, tuple[tuple[str, Refers], ...]]] = {
    operation: tuple((field.name, field.refers) for field in fields if field.refers is not None)
    for operation, fields in FIELDS.items()
}
"""The parameters of each operation that name something, with what they name."""

MIGRATIONS: Final[frozenset[Operation]] = frozenset(
    operation for operation, named in REFERENCES.items() if any(refers is Refers.HOST for _, refers in named)
)
"""Migrations and evacuation: the operations during which an instance is on two hosts."""
