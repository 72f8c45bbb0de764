"""Links between pages lead to pages and headings that exist, and so do the modules and folders that pages name."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parents[2]
PAGES = [*sorted(ROOT.glob("*.md")), *sorted((ROOT / "docs").rglob("*.md"))]
SOURCES = [ROOT, ROOT / "src", *(path for path in (ROOT / "src").rglob("*") if path.is_dir())]
LAYERS = "|".join(path.name for path in (ROOT / "src" / "interlock").iterdir() if path.is_dir())
SOURCE_PATH = re.compile(rf"`((?:src|tests|{LAYERS})/[\w/.]*|[\w/]+\.py)`")


def anchors(text: str) -> set[str]:
    """The anchors of a page's headings, as GitHub makes them."""
    headings = re.findall(r"^#+ (.*)$", text, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def broken_links(page: Path, text: str) -> Iterator[str]:
    for link in re.findall(r"\]\(([^)\s]+)\)", text):
        name, _, anchor = link.partition("#")
        target = page.parent / name if name else page
        if link.startswith("http"):
            continue
        if not target.exists() or (anchor and anchor not in anchors(target.read_text())):
            yield link


def missing_sources(text: str) -> Iterator[str]:
    for name in SOURCE_PATH.findall(text):
        if not any((folder / name).exists() for folder in SOURCES):
            yield name


def test_what_does_not_exist_is_found() -> None:
    page = ROOT / "docs" / "glossary.md"
    text = "[a](no.md) [b](glossary.md#glossary) [c](glossary.md#none) `core/states.py` `core/none.py` `none.py`"
    assert list(broken_links(page, text)) == ["no.md", "glossary.md#none"]
    assert list(missing_sources(text)) == ["core/none.py", "none.py"]


def test_links_and_the_names_of_modules_are_current() -> None:
    texts = {page: page.read_text() for page in PAGES}
    wrong = [f"{page.name}: {link}" for page, text in texts.items() for link in broken_links(page, text)]
    wrong += [f"{page.name}: {name}" for page, text in texts.items() for name in missing_sources(text)]
    assert wrong == []


def test_decisions_are_numbered_one_after_the_other() -> None:
    pages = sorted((ROOT / "docs" / "decisions").glob("*.md"))
    assert [int(page.name[:4]) for page in pages] == list(range(1, len(pages) + 1))
    for page in pages:
        assert page.read_text().startswith(f"# {int(page.name[:4])}. "), page.name
