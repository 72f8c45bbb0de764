"""The rules of the house that a linter does not know. What each is for is in docs/ARCHITECTURE.md."""

from __future__ import annotations

import ast
import re
import sys
from collections import defaultdict
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PACKAGE = ROOT / "src" / "interlock"
FUNCTION_LINES_MAX = 60
MODULE_LINES_MAX = 500
FORBIDDEN_NAMES = {"utils", "util", "helpers", "helper", "manager", "managers", "common", "misc"}

CORE_STANDARD_LIBRARY = {
    *(
        "__future__",
        "abc",
        "bisect",
        "collections",
        "dataclasses",
        "enum",
        "fractions",
        "functools",
        "hashlib",
        "heapq",
    ),
    *("ipaddress", "itertools", "math", "operator", "re", "string", "types", "typing"),
}
"""All that the core may use of it: nothing that waits, reads a clock, is random, logs, or touches the world."""

EXTERNAL_PACKAGES = {
    "core": {"msgspec"},
    "ports": {"msgspec"},
    "config": {"msgspec"},
    "config_file": {"msgspec"},
    "confinement": {"msgspec"},
    "policies": {"cryptography", "matplotlib", "msgspec", "numpy", "yaml"},
    "service": {"msgspec", "structlog"},
    "driver": {"msgspec", "structlog"},
    "stores": {"apsw", "msgspec", "structlog"},
    "hypervisors": {"cryptography", "httpx", "msgspec", "qemu", "structlog", "websockets"},
    "api": {"msgspec", "prometheus_client", "python_multipart", "starlette", "structlog", "swagger_ui", "uvicorn"},
    "dashboard": {"msgspec"},
    "guests": {"msgspec"},
    "networks": {"msgspec", "pyroute2", "structlog"},
    "images": {"httpx", "lz4", "msgspec", "oslo_utils", "pycdlib", "structlog", "zstandard"},
    "agent": {"msgspec", "structlog"},
    "server": {"msgspec", "starlette", "structlog", "uuid_utils", "uvicorn", "uvloop"},
    "cli": {"click", "httpx", "msgspec", "rich", "uvloop", "websockets"},
    "bench": {"apsw", "uvicorn", "uvloop"},
    "__main__": {"click"},
}
"""Which packages of others each layer may import."""


GERUNDS_OF_THE_FIELD = {"encoding", "formatting", "parsing", "rendering", "timekeeping", "timing"}
"""Words in "-ing" that may end a module's name; all others are verbs in disguise."""

FORMER_MODULE_NAMES = {
    *("callers", "choice", "dialling", "doors", "expectations", "fences", "grids", "inquiries", "invocation"),
    *("likeness", "meetings", "other_hosts", "oversight", "own_words", "passages", "patience", "places"),
    *("probes", "promises", "regions", "sections", "senses", "silence", "silences", "stories", "upkeep", "ways_out"),
    *("wiring", "wishes"),
}
"""Names that were metaphors; docs/glossary.md has the words in their place."""

MODULES_TO_RENAME = {
    "stores/migrations/versions/r0001_beginning.py",
}
"""May only become shorter."""

HOOKS_TO_REPLACE: set[str] = set()
"""Adapters with base classes that leave methods to others. May only become shorter."""

FORBIDDEN_WORDS = {
    *("afresh", "asking", "bringing", "charge", "door", "doors", "hear", "heard", "hears", "heed", "heeded", "heeding"),
    *("heeds", "journey", "landing", "lands", "mend", "mended", "passage", "passages", "seeing", "tell", "telling"),
    *("tells", "told", "travelling", "wish", "wished", "wishes"),
}
"""A word of the field stands for each of them: docs/glossary.md. They count in names, comments and texts alike."""

WORDS_TO_REPLACE = {
    # folder: the forbidden words that are still in its modules. May only become shorter.
    "cli/commands/policy": "told",
    "hypervisors/remote": "heard told",
    "policies/history": "told",
}


@cache
def modules() -> dict[Path, ast.Module]:
    return {path: ast.parse(path.read_text(), str(path)) for path in sorted(PACKAGE.rglob("*.py"))}


def layer(path: Path) -> str:
    return path.relative_to(PACKAGE).with_suffix("").parts[0]


def named(path: Path, line: int | None = None) -> str:
    place = str(path.relative_to(ROOT))
    return place if line is None else f"{place}:{line}"


def imports(tree: ast.Module) -> Iterator[tuple[str, int]]:
    """The top-level names of what a module imports absolutely, anywhere in it, and the lines."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((alias.name.partition(".")[0], node.lineno) for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and not node.level and node.module:
            yield node.module.partition(".")[0], node.lineno


def refuse(wrong: list[str]) -> None:
    if wrong:
        pytest.fail("\n".join(wrong), pytrace=False)


def test_there_is_something_to_judge() -> None:
    assert len(modules()) > 20


def test_every_module_says_what_lives_in_it() -> None:
    refuse([f"{named(path)}: no docstring" for path, tree in modules().items() if not ast.get_docstring(tree)])


def test_no_function_is_longer_than_a_screen() -> None:
    wrong = []
    for path, tree in modules().items():
        for node in ast.walk(tree):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                lines = (node.end_lineno or node.lineno) - node.lineno + 1
                if lines > FUNCTION_LINES_MAX:
                    wrong.append(f"{named(path, node.lineno)}: {node.name} has {lines} lines of {FUNCTION_LINES_MAX}")
    refuse(wrong)


def test_no_module_is_longer_than_can_be_kept_in_mind() -> None:
    lengths = {path: len(path.read_text().splitlines()) for path in modules()}
    refuse([f"{named(path)}: {n} lines of {MODULE_LINES_MAX}" for path, n in lengths.items() if n > MODULE_LINES_MAX])


def test_names_of_modules_are_nouns_of_the_field() -> None:
    wrong = []
    # A folder that a move has left behind holds nothing but caches.
    for path in sorted({*modules(), *(path.parent for path in modules())} - {PACKAGE}):
        if str(path.relative_to(PACKAGE)) in MODULES_TO_RENAME:
            continue
        last = path.stem.rpartition("_")[2]
        if path.stem in FORBIDDEN_NAMES:
            wrong.append(f"{named(path)}: such a name takes in anything")
        elif path.stem in FORMER_MODULE_NAMES or (last.endswith("ing") and last not in GERUNDS_OF_THE_FIELD):
            wrong.append(f"{named(path)}: name it by a noun of the field")
    gone = [f"MODULES_TO_RENAME: remove {name}" for name in sorted(MODULES_TO_RENAME) if not (PACKAGE / name).exists()]
    refuse(wrong + gone)


def test_no_two_classes_of_one_package_have_the_same_name() -> None:
    """A private class may repeat a name: it is read beside its only uses."""
    found: dict[str, dict[str, list[str]]] = defaultdict(lambda: defaultdict(list))
    for path, tree in modules().items():
        for node in tree.body:
            if isinstance(node, ast.ClassDef) and not node.name.startswith("_"):
                found[layer(path)][node.name].append(named(path, node.lineno))
    refuse(
        [
            f"{package}: {name} is a class in {', '.join(at)}"
            for package, names in found.items()
            for name, at in names.items()
            if len(at) > 1
        ]
    )


def test_adapters_are_composed_of_parts_and_not_of_bases_with_hooks() -> None:
    """A part that needs something gets it in its constructor; a protocol says what that can do."""
    found = {
        str(path.relative_to(PACKAGE))
        for path, tree in modules().items()
        for node in ast.walk(tree)
        if layer(path) in {"hypervisors", "stores"}
        and isinstance(node, ast.Raise)
        and "NotImplementedError" in ast.dump(node)
    }
    refuse([f"src/interlock/{name}: a hook that raises NotImplementedError" for name in found - HOOKS_TO_REPLACE])
    refuse([f"HOOKS_TO_REPLACE: remove {name}" for name in HOOKS_TO_REPLACE - found])


def forbidden_words(text: str) -> set[str]:
    """The forbidden words in a text; parts of names in snake case, camel case and capitals are words too."""
    return FORBIDDEN_WORDS & {word.lower() for word in re.findall(r"[A-Z]+(?![a-z])|[A-Z]?[a-z]+", text)}


def test_forbidden_words_are_found_in_names_and_in_prose() -> None:
    assert forbidden_words("def heed_loss(self): ...") == {"heed"}
    assert forbidden_words("class DiskPassage: WISH_MAX = 1  # Told once.") == {"passage", "wish", "told"}
    assert forbidden_words("an intelligible outdoors heading") == set()


def test_words_that_were_replaced_do_not_return_to_the_code() -> None:
    found: dict[str, set[str]] = defaultdict(set)
    wrong = []
    for path in modules():
        folder = str(path.parent.relative_to(PACKAGE))
        words = forbidden_words(path.read_text())
        found[folder] |= words
        wrong += [
            f"{named(path)}: '{word}' is not a word of the field"
            for word in sorted(words - set(WORDS_TO_REPLACE.get(folder, "").split()))
        ]
    clean = [f'WORDS_TO_REPLACE: remove "{folder}", which has none' for folder in WORDS_TO_REPLACE if not found[folder]]
    refuse(wrong + clean)


def test_words_that_were_replaced_do_not_return_to_the_documentation() -> None:
    refuse(
        [
            f"{path.relative_to(ROOT)}: '{word}' is not a word of the field"
            for path in [ROOT / "README.md", ROOT / "CHANGELOG.md", *sorted((ROOT / "docs").rglob("*.md"))]
            for word in sorted(forbidden_words(path.read_text()))
        ]
    )


def test_names_of_test_modules_are_unique() -> None:
    """The test runner imports a module under its name from the outermost folder with an `__init__.py`."""
    seen: dict[str, Path] = {}
    wrong = []
    for path in sorted((ROOT / "tests").rglob("*.py")):
        packages = [parent for parent in path.parents if (parent / "__init__.py").exists()]
        name = str(path.relative_to(packages[-1].parent if packages else path.parent))
        if path.stem != "conftest" and seen.setdefault(name, path) != path:
            wrong.append(f"{named(path)}: there is {named(seen[name])} already")
    refuse(wrong)


def test_types_are_not_ignored_in_the_core() -> None:
    wrong = [
        f"{named(path, number)}: a type is ignored"
        for path in modules()
        if layer(path) == "core"
        for number, line in enumerate(path.read_text().splitlines(), start=1)
        if re.search(r"#\s*(type:\s*ignore|mypy:|pyright:)", line)
    ]
    refuse(wrong)


def test_the_core_imports_nothing_that_waits_reads_a_clock_or_logs() -> None:
    wrong = [
        f"{named(path, line)}: the core may not import {name}"
        for path, tree in modules().items()
        if layer(path) == "core"
        for name, line in imports(tree)
        if name in sys.stdlib_module_names and name not in CORE_STANDARD_LIBRARY
    ]
    refuse(wrong)


def test_each_layer_imports_only_the_packages_that_are_its_own() -> None:
    wrong = []
    for path, tree in modules().items():
        where = layer(path)
        if where == "__init__":
            continue
        for name, line in imports(tree):
            if name != "interlock" and name not in sys.stdlib_module_names | EXTERNAL_PACKAGES.get(where, set()):
                wrong.append(f"{named(path, line)}: {where} may not import {name}")
    refuse(wrong)


def test_imports_name_where_a_thing_lives() -> None:
    wrong = [
        f"{named(path, node.lineno)}: a relative import hides its direction"
        for path, tree in modules().items()
        for node in ast.walk(tree)
        if isinstance(node, ast.ImportFrom) and node.level
    ]
    refuse(wrong)


def test_the_map_names_every_folder_and_none_that_is_not_there() -> None:
    text = (ROOT / "docs" / "ARCHITECTURE.md").read_text()
    folders = {
        f"{path.relative_to(PACKAGE)}/"
        for path in PACKAGE.rglob("*")
        if path.is_dir() and path.name != "__pycache__" and any(entry.name != "__pycache__" for entry in path.iterdir())
    }
    top = {f"{path.name}" for path in PACKAGE.glob("*.py") if path.name != "__init__.py"}
    missing = [
        f"docs/ARCHITECTURE.md does not name `{name}`" for name in sorted(folders | top) if f"`{name}`" not in text
    ]
    rows = re.findall(r"^\| (`[^|]*`) \|", text, flags=re.MULTILINE)
    named_there = {name for row in rows for name in re.findall(r"`([a-z_/]+/)`", row)}
    gone = [f"docs/ARCHITECTURE.md names `{name}`, which is not there" for name in sorted(named_there - folders)]
    refuse(missing + gone)
