"""Generators of reference pages: docs/reference/cli.md, configuration.md, and the operations in http.md."""

from __future__ import annotations

import ast
import inspect
from collections.abc import Iterator

import click
import msgspec

from interlock.cli.failures import MEANINGS
from interlock.core.operations import CATALOGUE, FIELDS, Operation
from interlock.core.parameters import Field

# ----------------------------------------------------------------------------------------------------- command line


def cli_page(root: click.Group) -> str:
    """docs/reference/cli.md."""
    lines = [
        "# Command line",
        "",
        "<!-- Drawn by `make docs`; a test compares the two. -->",
        "",
        "A server on this machine and its token are found in the data folder: `INTERLOCK_DATA_DIR`, or",
        "`/var/lib/interlock` for root and `~/.local/share/interlock` for others. Set `INTERLOCK_URL` (or `--url`) and",
        "`INTERLOCK_TOKEN` for another server. VMs, images and volumes are given by name or id. `NO_COLOR` disables",
        "colours; there are none in a pipe.",
        "",
        "`--json` prints one JSON document on standard output, or one per line for a stream. A failure is then one",
        "problem document (RFC 9457) on standard error.",
        "",
        "`--wait` shows the phases of an operation until it ends: one changing line on a terminal, lines elsewhere. It",
        "reconnects after a restart of the server. Ctrl-C ends the wait, not the operation.",
        "",
        "## Exit codes",
        "",
        "| code | meaning |",
        "|---:|---|",
        *(f"| {code.value} | {meaning} |" for code, meaning in MEANINGS.items()),
        "",
        "## Commands",
        "",
    ]
    for path, command in _commands(root, "interlock"):
        lines += _command_lines(path, command)
    return "\n".join(lines)


def _commands(group: click.Group, path: str) -> Iterator[tuple[str, click.Command]]:
    context = click.Context(group, info_name=path)
    for name in group.list_commands(context):
        command = group.get_command(context, name)
        if command is None or command.hidden:
            continue
        if isinstance(command, click.Group):
            yield from _commands(command, f"{path} {name}")
        else:
            yield f"{path} {name}", command


def _command_lines(path: str, command: click.Command) -> list[str]:
    context = click.Context(command, info_name=path)
    usage = " ".join([path, *command.collect_usage_pieces(context)])
    lines = [f"### `{usage}`", "", *_paragraphs(command.help or "")]
    records = [parameter.get_help_record(context) for parameter in command.get_params(context)]
    options = [record for record in records if record is not None and record[1] and not record[0].endswith("--help")]
    if options:
        lines += ["| option | meaning |", "|---|---|"]
        lines += [f"| `{_cell(names)}` | {_cell(meaning)} |" for names, meaning in options]
        lines.append("")
    return lines


def _paragraphs(text: str) -> Iterator[str]:
    """Yield a command's help as Markdown; preformatted paragraphs become code blocks."""
    for paragraph in inspect.cleandoc(text).split("\n\n"):
        if paragraph.startswith("\b"):
            yield from ("```", *paragraph.splitlines()[1:], "```")
        else:
            yield from (*paragraph.splitlines(), "")


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("\n", " ")


# -------------------------------------------------------------------------------------------------------- operations

BEGIN = "<!-- Drawn by `make docs`: the operations -->\n"
END = "<!-- end of the operations -->\n"


def http_page(written: str) -> str:
    """docs/reference/http.md, with the table of operations drawn anew; the rest is written by hand."""
    before, _, rest = written.partition(BEGIN)
    _, _, after = rest.partition(END)
    rows = "".join(f"| `{one.value}` | {_cell(CATALOGUE[one].summary)} | {_parameters(one)} |\n" for one in Operation)
    return f"{before}{BEGIN}\n| operation | what it does | parameters |\n|---|---|---|\n{rows}\n{END}{after}"


def _parameters(operation: Operation) -> str:
    named = [f"`{field.name}`{_presence(field)}: {_cell(field.description)}" for field in FIELDS[operation]]
    some = " At least one is required." if CATALOGUE[operation].parameters.required_any else ""
    return "<br>".join(named) + some


def _presence(field: Field) -> str:
    if field.required:
        return " (required)"
    return f" ({msgspec.json.encode(field.default).decode()})" if field.default not in (None, {}, ()) else ""


# ---------------------------------------------------------------------------------------------------- configuration


def configuration_page() -> str:
    """docs/reference/configuration.md."""
    from interlock.config import (
        ENVIRONMENT_PREFIX,
        AuditConfig,
        ClockConfig,
        Config,
        DriverConfig,
        HostsConfig,
        HttpConfig,
        QemuConfig,
        TokensConfig,
        UpkeepConfig,
    )

    lines = [
        "# Configuration",
        "",
        "<!-- Drawn by `make docs`; a test compares the two. -->",
        "",
        "A TOML file, given by `interlock serve --config FILE` or `INTERLOCK_CONFIG`, and environment variables, which",
        "take precedence. All keys are optional. Unknown keys and invalid values are errors; unknown variables with",
        "the prefix `INTERLOCK_` are logged as warnings.",
        "",
        "## Top level",
        "",
        *_table(Config, ENVIRONMENT_PREFIX),
        "",
        *_table_of("driver", DriverConfig, "Execution of requests by the state drivers."),
        *_table_of("upkeep", UpkeepConfig, "Scheduled actions of the server, submitted to the gate like any request."),
        *_table_of("qemu", QemuConfig, "QEMU processes and timeouts."),
        *_table_of("http", HttpConfig, "Limits on what a client of the HTTP API may send, hold and ask."),
        *_table_of("hosts", HostsConfig, "Other hosts, and shared storage."),
        *_table_of("clock", ClockConfig, "Jumps of the wall clock."),
        *_table_of("tokens", TokensConfig, "Access tokens."),
        *_table_of("audit", AuditConfig, "The audit log."),
        "## For the command line only",
        "",
        "| variable | meaning |",
        "|---|---|",
        "| `INTERLOCK_CONFIG` | Configuration file of `serve`, `demo` and `db upgrade`. |",
        "| `INTERLOCK_URL` | URL of the server, instead of the one on this machine. |",
        "| `INTERLOCK_TOKEN` | Access token, instead of the admin token in the data folder. |",
        "| `INTERLOCK_CA` | PEM file of CAs that the server's certificate may be from, besides the system's. |",
        "| `INTERLOCK_INSECURE_PLAIN_HTTP` | `1`: allow a URL beyond loopback without TLS. |",
        "| `NO_COLOR` | Disables colours if set. |",
        "",
    ]
    return "\n".join(lines)


def _table_of(name: str, struct: type[msgspec.Struct], about: str) -> Iterator[str]:
    from interlock.config import ENVIRONMENT_PREFIX

    yield from (f"## `[{name}]`", "", about, "")
    yield from _table(struct, f"{ENVIRONMENT_PREFIX}{name.upper()}_")
    yield ""


def _table(struct: type[msgspec.Struct], prefix: str) -> Iterator[str]:
    docstrings = _field_docstrings(struct)
    yield "| key | environment | default | meaning |"
    yield "|---|---|---|---|"
    for field in msgspec.structs.fields(struct):
        if isinstance(field.default, msgspec.Struct):
            continue
        default = "" if field.default == "" else f"`{_toml(field.default)}`"
        meaning = docstrings.get(field.name) or f"{field.name.replace('_', ' ').capitalize()}."
        yield f"| `{field.name}` | `{prefix}{field.name.upper()}` | {default} | {_cell(meaning)} |"


def _toml(value: object) -> str:
    return msgspec.json.encode(value).decode()


def _field_docstrings(struct: type[msgspec.Struct]) -> dict[str, str]:
    """Return each field's docstring and, for a Literal, its values."""
    body = ast.parse(inspect.getsource(struct)).body[0]
    assert isinstance(body, ast.ClassDef)
    docstrings: dict[str, str] = {}
    field = ""
    for node in body.body:
        match node:
            case ast.AnnAssign(target=ast.Name(id=name)):
                field = name
                docstrings[field] = _choices(node.annotation)
            case ast.Expr(value=ast.Constant(value=str(text))) if field:
                docstrings[field] = " ".join((" ".join(text.split()) + " " + docstrings[field]).split())
            case _:
                field = ""
    return docstrings


def _choices(annotation: ast.expr) -> str:
    match annotation:
        case ast.Subscript(value=ast.Name(id="Literal"), slice=ast.Tuple(elts=values)):
            return f"One of {', '.join(f'`{ast.unparse(value)}`' for value in values)}.".replace("'", '"')
        case _:
            return ""
