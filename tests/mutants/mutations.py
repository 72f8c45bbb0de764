"""The mutants of a module: functions with one change each."""

from __future__ import annotations

import ast
import copy
import hashlib
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from types import CodeType
from typing import Any, Final, NamedTuple

Function = ast.FunctionDef | ast.AsyncFunctionDef
Edit = Callable[[ast.AST], ast.AST | None]
"""Returns what replaces a node of a copy; None removes a statement."""

_COMPARISONS: Final[dict[type[ast.cmpop], tuple[type[ast.cmpop], ...]]] = {
    ast.Lt: (ast.LtE, ast.GtE),
    ast.LtE: (ast.Lt, ast.Gt),
    ast.Gt: (ast.GtE, ast.LtE),
    ast.GtE: (ast.Gt, ast.Lt),
    ast.Eq: (ast.NotEq,),
    ast.NotEq: (ast.Eq,),
    ast.Is: (ast.IsNot,),
    ast.IsNot: (ast.Is,),
    ast.In: (ast.NotIn,),
    ast.NotIn: (ast.In,),
}
_ARITHMETIC: Final[dict[type[ast.operator], type[ast.operator]]] = {
    ast.Add: ast.Sub,
    ast.Sub: ast.Add,
    ast.Mult: ast.FloorDiv,
    ast.FloorDiv: ast.Mult,
    ast.BitAnd: ast.BitOr,
    ast.BitOr: ast.BitAnd,
}
_CALLS: Final = {"min": "max", "max": "min", "any": "all", "all": "any"}
_CODE: Final = re.compile(r"[a-z]+([._][a-z]+)*")
"""Texts that programs read: names of events, states and reasons. Sentences for people are not changed."""


class Mutant(NamedTuple):
    """One change of one function."""

    file: str
    """Relative to the project's root."""
    function: str
    """The qualified name of the outermost function."""
    line: int
    change: str
    """Source before and after, as in `a < b -> a <= b`."""
    number: int
    """Which of the mutants of the function it is, from 0."""
    statement: int = 0
    """The line at which the statement begins that contains the change."""
    around: range = range(0)
    """The lines of the function."""
    digest: str = ""
    """Of the function as it is."""

    @property
    def name(self) -> str:
        """Return a name that stays the same while the function does."""
        return f"{self.file}::{self.function}: {self.change}"


class _Site(NamedTuple):
    node: ast.AST
    edit: Edit
    statement: int


def mutants_of(path: Path, root: Path) -> Iterator[Mutant]:
    """Yield the mutants of a file, in the order of its lines."""
    file = str(path.relative_to(root))
    for name, function in _functions(ast.parse(path.read_text(encoding="utf-8"))):
        digest = hashlib.sha256(ast.unparse(function).encode()).hexdigest()[:16]
        lines = range(function.lineno, (function.end_lineno or function.lineno) + 1)
        for number, site in enumerate(_sites(function)):
            yield Mutant(file, name, _line(site.node), _described(site), number, site.statement, lines, digest)


def mutated(path: Path, mutant: Mutant) -> tuple[CodeType, int]:
    """Return the code of the mutant's function, and the line at which the function begins."""
    module = ast.parse(path.read_text(encoding="utf-8"))
    function = next(each for name, each in _functions(module) if name == mutant.function)
    site = list(_sites(function))[mutant.number]
    _Replacer(site).visit(module)
    code = compile(ast.fix_missing_locations(module), str(path), "exec")
    return next(each for each in codes_in(code) if each.co_qualname == mutant.function), function.lineno


def codes_in(code: CodeType) -> Iterator[CodeType]:
    """Yield the code of everything that is defined within a code."""
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield constant
            yield from codes_in(constant)


def _functions(module: ast.Module) -> Iterator[tuple[str, Function]]:
    """Yield the outermost functions of a module with their qualified names."""

    def within(body: list[ast.stmt], prefix: str) -> Iterator[tuple[str, Function]]:
        for statement in body:
            if isinstance(statement, Function):
                yield f"{prefix}{statement.name}", statement
            elif isinstance(statement, ast.ClassDef):
                yield from within(statement.body, f"{prefix}{statement.name}.")

    return within(module.body, "")


class _Replacer(ast.NodeTransformer):
    def __init__(self, site: _Site) -> None:
        self._site = site

    def visit(self, node: ast.AST) -> ast.AST | None:
        if node is self._site.node:
            changed = self._site.edit(copy.deepcopy(node))
            return ast.copy_location(ast.Pass() if changed is None else changed, node)
        self.generic_visit(node)
        return node


def _sites(function: Function) -> Iterator[_Site]:
    """Yield what can be changed in a function: not its signature, annotations, assertions, messages and logs."""
    body = function.body
    if ast.get_docstring(function) is not None:
        body = body[1:]
    pending: list[tuple[ast.AST, int]] = [(each, each.lineno) for each in reversed(body)]
    while pending:
        node, statement = pending.pop()
        if isinstance(node, ast.stmt):
            statement = node.lineno
        if isinstance(node, ast.Assert) or (isinstance(node, ast.Call) and _name(node.func) == "assert_never"):
            continue
        if isinstance(node, ast.Expr) and ast.unparse(node).startswith("_LOG."):
            continue
        for edit in _edits(node):
            yield _Site(node, edit, statement)
        pending += [(child, statement) for child in reversed(list(_children(node)))]


def _children(node: ast.AST) -> Iterator[ast.AST]:
    for field, value in ast.iter_fields(node):
        if field in {"annotation", "returns", "decorator_list", "args"} and not isinstance(node, ast.Call):
            continue
        for child in value if isinstance(value, list) else [value]:
            if isinstance(child, ast.AST) and not _is_docstring(child):
                yield child


def _is_docstring(node: ast.AST) -> bool:
    return isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str)


def _edits(node: ast.AST) -> Iterator[Edit]:
    edits = _EDITS.get(type(node))
    return iter(()) if edits is None else edits(node)


def _comparison(node: ast.Compare) -> Iterator[Edit]:
    def other(operator: type[ast.cmpop]) -> Edit:
        return lambda copied: _with(copied, ops=[operator()])

    if len(node.ops) == 1:
        yield from map(other, _COMPARISONS[type(node.ops[0])])


def _conjunction(node: ast.BoolOp) -> Iterator[Edit]:
    yield lambda copied: _with(copied, op=ast.Or() if isinstance(node.op, ast.And) else ast.And())


def _negation(node: ast.UnaryOp) -> Iterator[Edit]:
    if isinstance(node.op, ast.Not):
        yield lambda _copied: node.operand


def _arithmetic(node: ast.BinOp) -> Iterator[Edit]:
    other = _ARITHMETIC.get(type(node.op))
    if other is not None:
        yield lambda copied: _with(copied, op=other())


def _constant(node: ast.Constant) -> Iterator[Edit]:
    match node.value:
        case bool(value):
            yield lambda copied: _with(copied, value=not value)
        case int(number):
            yield lambda copied: _with(copied, value=number + 1)
        case str(text) if _CODE.fullmatch(text):
            yield lambda copied: _with(copied, value=f"{text}_")


def _call(node: ast.Call) -> Iterator[Edit]:
    other = _CALLS.get(_name(node.func))
    if other is not None:
        yield lambda copied: _with(copied, func=ast.Name(other, ast.Load()))


def _branch(_node: ast.AST) -> Iterator[Edit]:
    yield lambda copied: _with(copied, test=ast.UnaryOp(ast.Not(), getattr(copied, "test")))  # noqa: B009 (If or IfExp)


def _return(node: ast.Return) -> Iterator[Edit]:
    if node.value is not None and not _is_none(node.value):
        yield lambda copied: _with(copied, value=ast.Constant(None))


def _effect(node: ast.Expr | ast.AugAssign) -> Iterator[Edit]:
    if isinstance(node, ast.AugAssign) or isinstance(node.value, ast.Call | ast.Await):
        yield lambda _copied: None


def _jump(node: ast.Break | ast.Continue) -> Iterator[Edit]:
    yield lambda _copied: ast.Continue() if isinstance(node, ast.Break) else ast.Break()


_EDITS: Final[dict[type[ast.AST], Callable[[Any], Iterator[Edit]]]] = {
    ast.Compare: _comparison,
    ast.BoolOp: _conjunction,
    ast.UnaryOp: _negation,
    ast.BinOp: _arithmetic,
    ast.Constant: _constant,
    ast.Call: _call,
    ast.IfExp: _branch,
    ast.If: _branch,
    ast.Return: _return,
    ast.Expr: _effect,
    ast.AugAssign: _effect,
    ast.Break: _jump,
    ast.Continue: _jump,
}


def _with(node: ast.AST, **fields: object) -> ast.AST:
    for name, value in fields.items():
        setattr(node, name, value)
    return node


def _is_none(node: ast.AST) -> bool:
    return isinstance(node, ast.Constant) and node.value is None


def _name(node: ast.AST) -> str:
    return node.id if isinstance(node, ast.Name) else ""


def _line(node: ast.AST) -> int:
    return node.lineno  # type: ignore[attr-defined,no-any-return]  # operators have none, and are no sites


def _described(site: _Site) -> str:
    changed = site.edit(copy.deepcopy(site.node))
    return f"{_first_line(site.node)} -> {'nothing' if changed is None else _first_line(changed)}"


def _first_line(node: ast.AST) -> str:
    return ast.unparse(ast.fix_missing_locations(node)).partition("\n")[0]
