"""`interlock project`: create, list, show, limit and delete."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Final, TypeVar

import click

from interlock.api.schemas.projects import NewProject, Project, ProjectList, QuotaChange
from interlock.cli.client.paths import PROJECTS, path_of
from interlock.cli.completion import completer
from interlock.cli.context import Invocation, with_json
from interlock.cli.options.quantities import Size
from interlock.cli.output.confirmation import confirm, yes_option
from interlock.cli.output.formatting import age

CommandT = TypeVar("CommandT", bound=Callable[..., Any])

_TITLES: Final = {
    "instances": "VMs",
    "vcpus": "vCPUs",
    "memory_mib": "Memory (MiB)",
    "disk_mib": "Disk (MiB)",
    "volumes": "Volumes",
    "images": "Images",
    "outstanding_requests": "Outstanding requests",
    "held_requests": "Held requests",
}
_NONE: Final = "none"


class _Limit(click.ParamType[int | str]):
    """A limit: a number as another type reads it, or `none`."""

    name = "limit"

    def __init__(self, number: click.ParamType[int]) -> None:
        self._number = number

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int | str:
        return _NONE if value == _NONE else self._number.convert(value, param, ctx)


def _limit_options(command: CommandT) -> CommandT:
    """Add an option for each limit."""
    count = click.IntRange(min=0)
    sizes = {"memory_mib": ("--memory", Size("MiB", 0)), "disk_mib": ("--disk", Size("MiB", 0, bare="GiB"))}
    examples = {"memory_mib": ", such as 65536 (MiB) or 64GiB", "disk_mib": ", such as 500 (GiB)"}
    for field, title in reversed(_TITLES.items()):
        option, number = sizes.get(field, (f"--{field.replace('_', '-')}", count))
        what = f"Limit of {title.partition(' (')[0]}{examples.get(field, '')}; `none`: no limit."
        command = click.option(option, field, type=_Limit(number), metavar="LIMIT", help=what)(command)
    return command


def _change(limits: dict[str, int | str | None]) -> QuotaChange:
    named = {field: None if limit == _NONE else limit for field, limit in limits.items() if limit is not None}
    return QuotaChange(**named)  # type: ignore[arg-type]


@click.group("project")
def project_commands() -> None:
    """Projects, and what they may use."""


@project_commands.command("create")
@click.argument("name")
@click.option(
    "--with-history",
    is_flag=True,
    help="Confirm that its members may see records of VMs of an earlier project of that name.",
)
@_limit_options
@with_json
def create_project(invocation: Invocation, /, *, name: str, with_history: bool, **limits: int | str | None) -> None:
    """Create the project NAME, by default without limits. For admins."""
    new = NewProject(name=name, quota=_change(limits), with_history=with_history)
    reply = invocation.client.post(PROJECTS, new)
    if not invocation.print_json(reply):
        invocation.echo(f"Created: project {name}")


@project_commands.command("list")
@with_json
def list_projects(invocation: Invocation) -> None:
    """List the projects with what they use of their quotas. Those who are not admins see their own."""
    columns = {"NAME": lambda one: one.name} | {
        title.upper(): lambda one, field=field: _used(one, field) for field, title in _TITLES.items()
    }
    columns["AGE"] = lambda one: "-" if one.created_at is None else age(one.created_at, invocation.client.now)
    invocation.print_items(invocation.client.get(PROJECTS), ProjectList, columns)


def _used(project: Project, field: str) -> str:
    limit = getattr(project.quota, field)
    used = str(getattr(project.used, field))
    return used if limit is None else f"{used}/{limit}"


@project_commands.command("show")
@click.argument("project", shell_complete=completer(PROJECTS))
@with_json
def show_project(invocation: Invocation, *, project: str) -> None:
    """Show a project, its quota, what it uses and what is left."""
    _show(invocation, project)


def _show(invocation: Invocation, project: str) -> None:
    reply = invocation.client.get(path_of(PROJECTS, project))
    if not invocation.print_json(reply):
        _print(invocation, reply.decode(Project))


def _print(invocation: Invocation, project: Project) -> None:
    by = f" by {project.created_by}" if project.created_by else ""
    when = "" if project.created_at is None else f", created {age(project.created_at, invocation.client.now)} ago{by}"
    invocation.echo(f"{project.name}{when}")
    rows = []
    for field, title in _TITLES.items():
        used, limit = getattr(project.used, field), getattr(project.quota, field)
        left = "unlimited" if limit is None else str(max(0, limit - used))
        rows.append((title, str(used), "none" if limit is None else str(limit), left))
    invocation.table(("", "USED", "LIMIT", "LEFT"), rows)


@project_commands.command("quota")
@click.argument("project", shell_complete=completer(PROJECTS))
@_limit_options
@with_json
def project_quota(invocation: Invocation, /, *, project: str, **limits: int | str | None) -> None:
    """Change limits of a project, or show them. For admins; whoever is in the project may see them.

    What the project uses already stays, also beyond a limit; only more is
    refused.
    """
    if all(limit is None for limit in limits.values()):
        _show(invocation, project)
        return
    reply = invocation.client.patch(path_of(PROJECTS, project, "quota"), _change(limits))
    if not invocation.print_json(reply):
        _print(invocation, reply.decode(Project))


@project_commands.command("delete")
@click.argument("project", shell_complete=completer(PROJECTS))
@yes_option
@with_json
def delete_project(invocation: Invocation, *, project: str, yes: bool) -> None:
    """Delete a project with nothing in it, after confirmation. For admins.

    Its VMs, volumes, images and tokens must be deleted first. Records of
    deleted VMs are kept.
    """
    confirm(f"Delete the project {project}?", yes=yes)
    invocation.print_removed(invocation.client.delete(path_of(PROJECTS, project)), f"Deleted: {project}")
