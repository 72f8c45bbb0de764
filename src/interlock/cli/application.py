"""The whole command line: the tree of commands, and how a run ends."""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping, Sequence
from typing import Any

import click

import interlock.cli.operations  # noqa: F401 - adds its commands
from interlock.cli import (
    agent,
    console,
    dumps,
    host,
    inquiries,
    inventory,
    other_hosts,
    policy,
    policy_checks,
    policy_exploring,
    policy_fleet,
    policy_history,
    policy_live,
    policy_schema,
    policy_tables,
    protecting,
    reference,
    screen,
    server,
    ssh,
    travelling,
    watching,
)
from interlock.cli.demo import demo
from interlock.cli.exit_codes import ExitCode
from interlock.cli.failures import Failure
from interlock.cli.invocation import Invocation
from interlock.cli.refusals import failure_text
from interlock.cli.vm import vm_commands

COMMANDS: tuple[click.Command, ...] = (
    vm_commands,
    inquiries.why,
    watching.watch,
    inquiries.stuck,
    inquiries.request_commands,
    inventory.image_commands,
    inventory.volume_commands,
    inventory.token_commands,
    host.host_commands,
    policy.policy_commands,
    policy.rehearse,
    server.serve,
    agent.agent,
    demo,
    server.db_commands,
    server.completion,
    server.version,
    reference.reference,
)

POLICY_COMMANDS: tuple[click.Command, ...] = (
    *policy_checks.COMMANDS,
    *policy_tables.COMMANDS,
    *policy_exploring.COMMANDS,
    *policy_history.COMMANDS,
    *policy_fleet.COMMANDS,
    *policy_live.COMMANDS,
    *policy_schema.COMMANDS,
)
"""What `interlock policy` has besides `show`, in the order in which a policy is written, tried and switched on."""


class _ReaderGone(Exception):
    """Whoever read standard output has closed it. Not an `OSError`, of which click would make an exit of its own."""


class InOrder(click.Group):
    """A group that lists its commands in the order in which they were added: the most used first."""

    def list_commands(self, ctx: click.Context) -> list[str]:  # noqa: ARG002 - as click calls it
        return list(self.commands)

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except BrokenPipeError:
            raise _ReaderGone from None


def build(*more: click.Command) -> click.Group:
    """The root of the tree, with the commands that only the outermost layer can offer."""

    @click.group(
        cls=InOrder,
        context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
        epilog="The server and its token are found by themselves where they run on this machine; "
        "INTERLOCK_URL and INTERLOCK_TOKEN name others.",
    )
    @click.option("--url", metavar="URL", help="The server, instead of INTERLOCK_URL or the one on this machine.")
    @click.pass_context
    def interlock(context: click.Context, url: str | None) -> None:
        """Interlock keeps the state of virtual machines.

        One gate, a durable queue, and every answer says why.
        """
        context.ensure_object(Invocation).url = url

    for command in (*COMMANDS, *more):
        interlock.add_command(command)
    inventory.token_commands.add_command(server.recover_token)
    for command in travelling.COMMANDS:
        vm_commands.add_command(command)
    for command in other_hosts.COMMANDS:
        host.host_commands.add_command(command)
    for command in POLICY_COMMANDS:
        policy.policy_commands.add_command(command)
    vm_commands.add_command(protecting.protect)
    vm_commands.add_command(protecting.unprotect)
    for command in (console.console, dumps.dump, dumps.dumps, screen.screenshot, screen.vnc, ssh.ssh):
        vm_commands.add_command(command)
    return interlock


def run(root: click.Group, arguments: Sequence[str], environment: Mapping[str, str] | None = None) -> int:
    """Run one command line and give its exit code. Whatever goes wrong is told on standard error."""
    invocation = Invocation(os.environ if environment is None else environment)
    try:
        try:
            root.main(
                args=list(arguments),
                prog_name="interlock",
                complete_var=server.COMPLETION_VARIABLE,
                standalone_mode=False,
                obj=invocation,
            )
            sys.stdout.flush()
        except Failure as failure:
            _tell(invocation, failure)
            return failure.code
        except click.ClickException as error:
            error.show()
            return ExitCode.USAGE
        except click.exceptions.Exit as ending:
            return ending.exit_code
        except (click.Abort, KeyboardInterrupt):
            click.echo(err=True)
            return ExitCode.INTERRUPTED
    except (_ReaderGone, BrokenPipeError):
        return _quietly()
    return ExitCode.DONE


def _quietly() -> int:
    """Whoever read the output has seen enough. Nothing may be written to it at the interpreter's end either."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return ExitCode.DONE


def _tell(invocation: Invocation, failure: Failure) -> None:
    sys.stdout.flush()
    if invocation.json:
        if failure.text != "":
            import msgspec

            click.echo(msgspec.json.encode(failure.document), err=True)
        return
    text = failure_text(failure)
    if text:
        invocation.say(text, error=True)
