"""The reference says what the program says.

To draw the pages again: `make docs`.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import click
import pytest

from interlock.__main__ import root
from interlock.cli.failures import MEANINGS, ExitCode
from reference_pages import BEGIN, cli_page, configuration_page, http_page

REFERENCE = Path(__file__).parents[2] / "docs" / "reference"


def test_the_command_line_reference_is_what_the_program_says() -> None:
    assert (REFERENCE / "cli.md").read_text() == cli_page(root())


def test_the_configuration_reference_is_what_the_program_says() -> None:
    assert (REFERENCE / "configuration.md").read_text() == configuration_page()


def test_the_operations_in_the_http_reference_are_those_of_the_catalogue() -> None:
    written = (REFERENCE / "http.md").read_text()
    assert BEGIN in written
    assert written == http_page(written)


def test_every_exit_code_has_a_meaning() -> None:
    assert set(MEANINGS) == set(ExitCode)


def _tree(command: click.Command, path: tuple[str, ...]) -> Iterator[tuple[tuple[str, ...], click.Command]]:
    yield path, command
    if isinstance(command, click.Group):
        for name, child in command.commands.items():
            yield from _tree(child, (*path, name))


@pytest.mark.parametrize(
    ("path", "command"), list(_tree(root(), ())), ids=lambda value: " ".join(value) if isinstance(value, tuple) else ""
)
def test_every_command_explains_itself_and_its_options(path: tuple[str, ...], command: click.Command) -> None:
    assert command.help
    assert len(command.help.split(".")[0]) < 80
    context = click.Context(command, info_name="interlock")
    for parameter in command.get_params(context):
        if isinstance(parameter, click.Option):
            assert parameter.help, parameter.name
