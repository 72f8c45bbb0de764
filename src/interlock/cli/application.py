"""The tree of commands, and the entry point that maps exceptions to exit codes."""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping, Sequence
from typing import Any

import click

from interlock import __version__
from interlock.cli.commands import (  # each adds its commands to a group
    administration,
    clone,  # noqa: F401
    guest_access,  # noqa: F401
    hosts,
    inventory,
    networks,
    operations,  # noqa: F401
    server,
    watch,
    why,
)
from interlock.cli.commands.demo import demo
from interlock.cli.commands.policy import (  # likewise
    check,  # noqa: F401
    diff,  # noqa: F401
    explain,  # noqa: F401
    explore,  # noqa: F401
    fleet,  # noqa: F401
    load,  # noqa: F401
    nova_import,  # noqa: F401
    replay,  # noqa: F401
    suggest,  # noqa: F401
    table,  # noqa: F401
)
from interlock.cli.commands.policy import group as policy
from interlock.cli.commands.vm import vm_commands
from interlock.cli.context import Invocation
from interlock.cli.failures import ExitCode, Failure, missing_extra
from interlock.cli.output.refusals import failure_text

COMMANDS: tuple[click.Command, ...] = (
    vm_commands,
    why.why,
    watch.watch,
    why.stuck,
    why.request_commands,
    administration.audit,
    inventory.image_commands,
    inventory.volume_commands,
    networks.network_commands,
    networks.security_group_commands,
    administration.token_commands,
    administration.project_commands,
    hosts.host_commands,
    policy.policy_commands,
    policy.rehearse,
    server.serve,
    server.agent,
    demo,
    server.db_commands,
    server.completion,
    server.version,
)


class _BrokenPipe(Exception):
    """The reader closed standard output. Not an `OSError`, which click would turn into an exit."""


class OrderedGroup(click.Group):
    """A group that lists its commands in the order added: the most used first."""

    def list_commands(self, ctx: click.Context) -> list[str]:  # noqa: ARG002 - as click calls it
        return list(self.commands)

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except BrokenPipeError:
            raise _BrokenPipe from None


@click.command("help", add_help_option=False, context_settings={"ignore_unknown_options": True})
@click.argument("words", nargs=-1, metavar="[COMMAND]...")
@click.pass_context
def help_of(context: click.Context, words: tuple[str, ...]) -> None:
    """Show the help of a command, as its --help does."""
    root = context.find_root()
    root.command.main([*words, "--help"], prog_name=root.info_name, standalone_mode=False, obj=root.obj)


def build(*more: click.Command) -> click.Group:
    """Return the root command, with additional commands of the outermost layer."""

    @click.group(
        cls=OrderedGroup,
        context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
        epilog="A server on this machine and its token are found automatically; "
        "set INTERLOCK_URL and INTERLOCK_TOKEN for another.",
    )
    @click.version_option(__version__, "-V", "--version", message="%(prog)s %(version)s")
    @click.option(
        "--url", metavar="URL", help="URL of the server, instead of INTERLOCK_URL or the server on this machine."
    )
    @click.option(
        "--ca", metavar="FILE", help="PEM file of CAs that its certificate may be from, besides the system's."
    )
    @click.pass_context
    def interlock(context: click.Context, url: str | None, ca: str | None) -> None:
        """Manage virtual machines.

        One gate decides every request, a durable queue keeps it, and every
        answer says why.
        """
        invocation = context.ensure_object(Invocation)
        invocation.url, invocation.ca = url, ca

    for command in (*COMMANDS, *more, help_of):
        interlock.add_command(command)
    administration.token_commands.add_command(server.recover_token)
    return interlock


def run(root: click.Group, arguments: Sequence[str], environment: Mapping[str, str] | None = None) -> int:
    """Run one command line and return its exit code. Errors are printed on standard error."""
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
            _report(invocation, failure)
            return failure.code
        except click.ClickException as error:
            error.show()
            return ExitCode.USAGE
        except click.exceptions.Exit as exit_:
            return exit_.exit_code
        except (click.Abort, KeyboardInterrupt):
            click.echo(err=True)
            return ExitCode.INTERRUPTED
        except BrokenPipeError:
            raise
        except (OSError, ModuleNotFoundError) as error:
            not_here = _from_os_error(error) if isinstance(error, OSError) else missing_extra(error)
            _report(invocation, not_here)
            return not_here.code
    except (_BrokenPipe, BrokenPipeError):
        return _discard_output()
    finally:
        invocation.close()
    return ExitCode.DONE


def _from_os_error(error: OSError) -> Failure:
    """Return the failure of a system call on this machine. Raises the error again if it is a bug."""
    from interlock.ports.system_errors import system_failure

    failed = system_failure(error, "this machine")
    if failed is None:
        raise error
    return Failure(ExitCode.ENDED_OTHERWISE, failed.message, remedy=failed.remedy)


def _discard_output() -> int:
    """Redirect standard output to /dev/null, so that the interpreter's exit does not write to the closed pipe."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return ExitCode.DONE


def _report(invocation: Invocation, failure: Failure) -> None:
    sys.stdout.flush()
    if invocation.json:
        if failure.text != "":
            import msgspec

            click.echo(msgspec.json.encode(failure.document), err=True)
        return
    text = failure_text(failure)
    if text:
        invocation.echo(text, error=True)
