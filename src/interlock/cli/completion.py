"""Arguments that name a resource of the server or an operation, with shell completion."""

from __future__ import annotations

import contextlib
import difflib
import os
from collections.abc import Callable
from typing import Any, ParamSpec, TypeVar

import click
import msgspec

from interlock.cli.client.connection import find
from interlock.cli.client.http_client import Client
from interlock.cli.client.paths import INSTANCES
from interlock.cli.failures import Failure

Parameters = ParamSpec("Parameters")
AnswerT = TypeVar("AnswerT")

_COMPLETION_TIMEOUT_S = 1.0


def completer(collection: str) -> Callable[[click.Context, click.Parameter, str], list[str]]:
    """Return a shell completion of names in a collection; none if the server does not respond in time."""

    def complete(_context: click.Context, _parameter: click.Parameter, incomplete: str) -> list[str]:
        client = Client(lambda: find(os.environ), timeout_s=_COMPLETION_TIMEOUT_S)
        with contextlib.suppress(Failure, msgspec.MsgspecError, OSError), contextlib.closing(client):
            return [name for name in client.names(collection) if name.startswith(incomplete)]
        return []

    return complete


class OperationName(click.ParamType[Any]):
    """The name of an operation, with hyphens or underscores."""

    name = "operation"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        from interlock.core.operations import Operation

        word = str(value).lower().replace("-", "_")
        known = [operation.value for operation in Operation]
        if word in known:
            return Operation(word)
        near = difflib.get_close_matches(word, known, n=3, cutoff=0.5)
        hint = f"Did you mean {' or '.join(near)}?" if near else f"Operations: {', '.join(known)}."
        raise click.BadParameter(f"Unknown operation {value!r}. {hint}", ctx=ctx, param=param)

    def shell_complete(
        self,
        ctx: click.Context,  # noqa: ARG002 - as click calls it
        param: click.Parameter,  # noqa: ARG002
        incomplete: str,
    ) -> list[click.shell_completion.CompletionItem]:
        from click.shell_completion import CompletionItem

        from interlock.core.operations import Operation

        return [CompletionItem(one.value) for one in Operation if one.value.startswith(incomplete)]


class OperationNames(OperationName):
    """Comma-separated operations."""

    name = "operations"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        if isinstance(value, tuple):
            return value
        convert = super().convert
        return tuple(convert(word.strip(), param, ctx) for word in str(value).split(",") if word.strip())


def vm_argument(command: Callable[Parameters, AnswerT]) -> Callable[Parameters, AnswerT]:
    """Add the argument VM: a name or an id."""
    return click.argument("vm", metavar="VM", shell_complete=completer(INSTANCES))(command)
