"""The description of one condition of a rule: key, value, test, and words. `conditions` has every one of them."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from enum import Enum
from operator import attrgetter
from typing import Any, Final

import msgspec

from interlock.core.condition_kinds import Choice, Members
from interlock.core.states import VmState
from interlock.core.views import View


class Subject(Enum):
    """What the value that a condition tests belongs to."""

    CALLER = "caller"
    """Who asks, and when: a field of requests and submissions with the same name as the view's, which a request keeps
    as it was at its submission."""
    REQUEST = "request"
    PARAMETERS = "parameters"
    """What a request asks for: any caller may ask for anything else."""
    INSTANCE = "instance"
    QUEUE = "queue"
    TIME = "time"


class Condition(msgspec.Struct, frozen=True, kw_only=True):
    """One condition that a rule may have."""

    key: str
    """Its key in a policy file."""
    field: str
    """The field of `Conditions`."""
    reads: str
    """The field of `View` with the value that it tests."""
    subject: Subject
    kind: Choice | Members
    meaning: str
    """For the reference of the policy language."""
    example: Any
    title: str
    """What is before its value in a list of conditions, such as `role member`; for a flag, all of it."""
    option: str = ""
    """The help of the option that sets it, for a condition on the caller."""
    because: Callable[[Any], str]
    """Describe what is unusual about a value of the view, or of a member, as in `as the instance is locked`."""

    assumed: Callable[[VmState], Any] | None = None
    """For one that the model checker does not vary: the value that it has there, by vm_state."""
    assumption: str = ""
    """The same as a sentence."""

    @property
    def wire(self) -> str:
        """Return its field in the API, where times are in seconds."""
        return self.field.replace("_ms_", "_s_")

    @property
    def value(self) -> Callable[[View], Any]:
        """Return the function that gets its value from a view."""
        return attrgetter(self.reads)

    @property
    def usual(self) -> Any:
        """Return the value of a plain submission."""
        return _USUAL[self.reads]

    def of(self, rule: object) -> Any:
        """Return a rule's value; None if it has no such condition."""
        return getattr(rule, self.field)

    def wanted(self, rules: Iterable[object]) -> list[Any]:
        """Return the values of the rules that have this condition."""
        return [wanted for rule in rules if (wanted := getattr(rule, self.field)) is not None]


_USUAL: Final = {
    field.name: field.default for field in msgspec.structs.fields(View) if field.default is not msgspec.NODEFAULT
}
