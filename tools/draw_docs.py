"""Writes the pages of docs/ that are made from the program: `make docs`.

`python tools/draw_docs.py policies` writes the drawings of the built-in policies too, which need Graphviz.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

from findings_page import findings_page
from interlock.__main__ import root
from interlock.cli.commands.policy.group import schema_page
from language_page import language_page
from library_reference import page
from network_drawing import network_drawing
from policy_pages import files
from reference_pages import cli_page, configuration_page, http_page

DOCS = Path(__file__).parents[1] / "docs"


def reference() -> Iterator[tuple[str, str]]:
    """Yield the files of docs/reference that are drawn, by name."""
    yield "cli.md", cli_page(root())
    yield "configuration.md", configuration_page()
    yield "findings.md", findings_page()
    yield "http.md", http_page((DOCS / "reference" / "http.md").read_text(encoding="utf-8"))
    yield "library.md", page()
    yield "policy-language.md", language_page()
    yield "policy.schema.json", schema_page()


def guides() -> Iterator[tuple[str, str]]:
    """Yield the files of docs/guides that are drawn, by name."""
    yield "networks.svg", network_drawing()


def main() -> None:
    """Write the pages."""
    drawn = {"reference": reference, "guides": guides, **({"policies": files} if "policies" in sys.argv[1:] else {})}
    for folder, generate in drawn.items():
        for name, text in generate():
            (DOCS / folder / name).write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
