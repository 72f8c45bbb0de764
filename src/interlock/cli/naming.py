"""References to what the server has: the nearest name for one that is wrong, and completion in the shell."""

from __future__ import annotations

import contextlib
import difflib
import os
from collections.abc import Callable, Iterator
from typing import Any, ParamSpec, TypeVar
from urllib.parse import quote

import click
import msgspec

from interlock.cli.client import Client
from interlock.cli.connection import find
from interlock.cli.exit_codes import ExitCode
from interlock.cli.failures import Failure

Parameters = ParamSpec("Parameters")
AnswerT = TypeVar("AnswerT")

INSTANCES = "/v1/instances"
IMAGES = "/v1/images"
VOLUMES = "/v1/volumes"
TOKENS = "/v1/tokens"
_COMPLETION_TIMEOUT_S = 1.0


def path_of(collection: str, reference: str, *rest: str) -> str:
    """The path of one thing. Whatever the reference holds, it stays one part of the path."""
    return "/".join((collection, quote(reference, safe=""), *rest))


def names(client: Client, collection: str) -> list[str]:
    """The names of what is in a collection; the first page is enough for a suggestion."""
    items = client.get(collection).decode(dict[str, Any]).get("items", [])
    return [str(item["name"]) for item in items if "name" in item]


@contextlib.contextmanager
def suggesting(client: Client, collection: str, reference: str) -> Iterator[None]:
    """When nothing has the name, say which has the nearest."""
    try:
        yield
    except Failure as failure:
        if failure.code is ExitCode.NOT_FOUND and repr(reference)[1:-1] in failure.message:
            with contextlib.suppress(Failure):
                _suggest(failure, names(client, collection), reference)
        raise


def _suggest(failure: Failure, known: list[str], reference: str) -> None:
    near = difflib.get_close_matches(reference, known, n=3, cutoff=0.5)
    if near and reference not in known:
        failure.remedy = f"Did you mean {' or '.join(near)}?"


def completer(collection: str) -> Callable[[click.Context, click.Parameter, str], list[str]]:
    """Completion with the names in a collection. A server that does not answer soon completes nothing."""

    def complete(_context: click.Context, _parameter: click.Parameter, incomplete: str) -> list[str]:
        client = Client(lambda: find(os.environ), timeout_s=_COMPLETION_TIMEOUT_S)
        with contextlib.suppress(Failure, msgspec.MsgspecError, OSError), contextlib.closing(client):
            return [name for name in names(client, collection) if name.startswith(incomplete)]
        return []

    return complete


class OperationName(click.ParamType[Any]):
    """The name of an operation; hyphens may stand for underscores."""

    name = "operation"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        from interlock.core.operations import Operation

        word = str(value).lower().replace("-", "_")
        known = [operation.value for operation in Operation]
        if word in known:
            return Operation(word)
        near = difflib.get_close_matches(word, known, n=3, cutoff=0.5)
        hint = f"Did you mean {' or '.join(near)}?" if near else f"Operations: {', '.join(known)}."
        raise click.BadParameter(f"{value!r} is no operation. {hint}", ctx=ctx, param=param)

    def shell_complete(
        self,
        ctx: click.Context,  # noqa: ARG002 - as click calls it
        param: click.Parameter,  # noqa: ARG002
        incomplete: str,
    ) -> list[click.shell_completion.CompletionItem]:
        from click.shell_completion import CompletionItem

        from interlock.core.operations import Operation

        return [CompletionItem(one.value) for one in Operation if one.value.startswith(incomplete)]


def vm_argument(command: Callable[Parameters, AnswerT]) -> Callable[Parameters, AnswerT]:
    """The argument VM: a name or an id."""
    return click.argument("vm", metavar="VM", shell_complete=completer(INSTANCES))(command)
