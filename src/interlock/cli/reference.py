"""The reference pages that are drawn from the program itself, so that they cannot say anything else."""

from __future__ import annotations

import ast
import inspect
from collections.abc import Iterator

import click
import msgspec

from interlock.cli.exit_codes import MEANINGS


@click.command(hidden=True)
@click.argument("page", type=click.Choice(["cli", "configuration", "policy-language"]))
@click.pass_context
def reference(context: click.Context, page: str) -> None:
    """Print a page of the reference: this is how docs/reference/PAGE.md is made."""
    root = context.find_root().command
    assert isinstance(root, click.Group)
    match page:
        case "cli":
            text = cli_page(root)
        case "configuration":
            text = configuration_page()
        case _:
            from interlock.policies.language_page import language_page

            text = language_page()
    click.echo(text, nl=False)


# ----------------------------------------------------------------------------------------------------- command line


def cli_page(root: click.Group) -> str:
    """docs/reference/cli.md."""
    lines = [
        "# Command line",
        "",
        "<!-- Drawn by `interlock reference cli`; a test compares the two. -->",
        "",
        "The server and its token are found by themselves where they run on this machine: in the data folder, which is",
        "`INTERLOCK_DATA_DIR`, or `/var/lib/interlock` for root and `~/.local/share/interlock` for others.",
        "`INTERLOCK_URL` (or `--url`) and `INTERLOCK_TOKEN` name another server. A VM, image or volume is named by its",
        "name or its id. `NO_COLOR` turns colours off; in a pipe there are none.",
        "",
        "`--json` prints exactly one JSON document on standard output, the server's own where there is one, and one a",
        "line where the answer does not end. A failure is then one problem document (RFC 9457) on standard error.",
        "",
        "`--wait` shows the phases of an operation until it has ended: one changing line on a terminal, lines",
        "elsewhere. It goes on across a restart of the server. Ctrl-C ends the waiting, not the operation.",
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
    """A command's help as Markdown: what click keeps as it is written becomes a block."""
    for paragraph in inspect.cleandoc(text).split("\n\n"):
        if paragraph.startswith("\b"):
            yield from ("```", *paragraph.splitlines()[1:], "```")
        else:
            yield from (*paragraph.splitlines(), "")


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("\n", " ")


# ---------------------------------------------------------------------------------------------------- configuration


def configuration_page() -> str:
    """docs/reference/configuration.md."""
    from interlock.config import ENVIRONMENT_PREFIX, Config, DriverConfig, HostsConfig, QemuConfig, UpkeepConfig

    lines = [
        "# Configuration",
        "",
        "<!-- Drawn by `interlock reference configuration`; a test compares the two. -->",
        "",
        "A TOML file, named with `interlock serve --config FILE` or `INTERLOCK_CONFIG`, and the environment, which",
        "goes before it. Nothing has to be set. An unknown key or a wrong value is refused, with the nearest key; an",
        "unknown variable that begins with `INTERLOCK_` is warned of in the server's log.",
        "",
        "## Top level",
        "",
        *_table(Config, ENVIRONMENT_PREFIX),
        "",
        *_table_of("driver", DriverConfig, "How the state drivers serve requests."),
        *_table_of("upkeep", UpkeepConfig, "What the server asks for by itself, of the gate, as everybody does."),
        *_table_of("qemu", QemuConfig, "How guests are held by QEMU, and waited for."),
        *_table_of("hosts", HostsConfig, "The hosts beside the server's own, and what they have in common with it."),
        "## For the command line only",
        "",
        "| variable | meaning |",
        "|---|---|",
        "| `INTERLOCK_CONFIG` | The configuration file of `serve`, `demo` and `db upgrade`. |",
        "| `INTERLOCK_URL` | The server to speak to, instead of the one on this machine. |",
        "| `INTERLOCK_TOKEN` | The token to show it, instead of the admin token in the data folder. |",
        "| `SSL_CERT_FILE` | A PEM file of authorities to trust, for a server with a certificate of your own. |",
        "| `NO_COLOR` | If it is set, nothing is coloured. |",
        "",
    ]
    return "\n".join(lines)


def _table_of(name: str, struct: type[msgspec.Struct], about: str) -> Iterator[str]:
    from interlock.config import ENVIRONMENT_PREFIX

    yield from (f"## `[{name}]`", "", about, "")
    yield from _table(struct, f"{ENVIRONMENT_PREFIX}{name.upper()}_")
    yield ""


def _table(struct: type[msgspec.Struct], prefix: str) -> Iterator[str]:
    sentences = _sentences(struct)
    yield "| key | environment | default | meaning |"
    yield "|---|---|---|---|"
    for field in msgspec.structs.fields(struct):
        if isinstance(field.default, msgspec.Struct):
            continue
        default = "" if field.default == "" else f"`{_toml(field.default)}`"
        meaning = sentences.get(field.name) or f"{field.name.replace('_', ' ').capitalize()}."
        yield f"| `{field.name}` | `{prefix}{field.name.upper()}` | {default} | {_cell(meaning)} |"


def _toml(value: object) -> str:
    return msgspec.json.encode(value).decode()


def _sentences(struct: type[msgspec.Struct]) -> dict[str, str]:
    """The sentence under each field, and its unit or choice where that is in the name or the type."""
    body = ast.parse(inspect.getsource(struct)).body[0]
    assert isinstance(body, ast.ClassDef)
    sentences: dict[str, str] = {}
    field = ""
    for node in body.body:
        match node:
            case ast.AnnAssign(target=ast.Name(id=name)):
                field = name
                sentences[field] = _choices(node.annotation)
            case ast.Expr(value=ast.Constant(value=str(text))) if field:
                sentences[field] = " ".join((" ".join(text.split()) + " " + sentences[field]).split())
            case _:
                field = ""
    return sentences


def _choices(annotation: ast.expr) -> str:
    match annotation:
        case ast.Subscript(value=ast.Name(id="Literal"), slice=ast.Tuple(elts=values)):
            return f"One of {', '.join(f'`{ast.unparse(value)}`' for value in values)}.".replace("'", '"')
        case _:
            return ""
