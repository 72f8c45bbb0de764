"""On which line of a TOML text each table and key stands.

The standard library's reader keeps no positions, so this walks the text a second time. It is only ever given text
that the reader has accepted, and so need not notice errors; values are not read here.
"""

from __future__ import annotations

from typing import Final

Path = tuple[str | int, ...]

_QUOTES: Final = ('"""', "'''", '"', "'")


class Positions:
    """Lines, counted from 1, by path, such as `("rule", 2, "threshold")`."""

    def __init__(self, text: str) -> None:
        self._lines = _Walk(text).lines

    def line(self, path: Path) -> int:
        """The line of `path`, or of the nearest thing around it that has one."""
        while path not in self._lines and path:
            path = path[:-1]
        return self._lines.get(path, 1)


class _Walk:
    def __init__(self, text: str) -> None:
        self._text = text.replace("\r\n", "\n")
        self._at = 0
        self._line = 1
        self._table: Path = ()
        self._arrays: dict[Path, int] = {}
        self.lines: dict[Path, int] = {}
        while self._skip_blank():
            if self._text[self._at] == "[":
                self._header()
            else:
                self._pair()

    def _skip_blank(self) -> bool:
        """Go to the next thing that is written; False at the end."""
        while self._at < len(self._text):
            character = self._text[self._at]
            if character == "#":
                self._skip_comment()
            elif character.isspace():
                self._step()
            else:
                return True
        return False

    def _step(self) -> None:
        self._line += self._text[self._at] == "\n"
        self._at += 1

    def _skip_comment(self) -> None:
        end = self._text.find("\n", self._at)
        self._at = len(self._text) if end < 0 else end

    def _header(self) -> None:
        double = self._text.startswith("[[", self._at)
        self._at += 2 if double else 1
        keys = self._keys("]")
        self._at += 2 if double else 1
        path: Path = ()
        for key in keys[:-1]:
            path = (*path, key)
            if path in self._arrays:
                path = (*path, self._arrays[path])
        path = (*path, keys[-1])
        if double:
            self._arrays[path] = self._arrays.get(path, -1) + 1
            path = (*path, self._arrays[path])
        self._table = path
        self.lines.setdefault(path, self._line)

    def _pair(self) -> None:
        line = self._line
        path = (*self._table, *self._keys("="))
        self._at += 1
        self.lines.setdefault(path, line)
        self._skip_value()

    def _keys(self, end: str) -> list[str]:
        """The parts of a dotted key, up to `end`. Escapes stay as written: such a key is only found less exactly."""
        parts = [""]
        while (character := self._text[self._at]) != end:
            if character in "\"'":
                start = self._at + 1
                self._skip_string()
                parts[-1] += self._text[start : self._at - 1]
                continue
            if character == ".":
                parts.append("")
            elif not character.isspace():
                parts[-1] += character
            self._step()
        return parts

    def _skip_value(self) -> None:
        depth = 0
        while self._at < len(self._text):
            character = self._text[self._at]
            if character == "\n" and depth == 0:
                return
            if character == "#":
                self._skip_comment()
            elif character in "\"'":
                self._skip_string()
            else:
                depth += (character in "[{") - (character in "]}")
                self._step()

    def _skip_string(self) -> None:
        quote = next(quote for quote in _QUOTES if self._text.startswith(quote, self._at))
        self._at += len(quote)
        while not self._text.startswith(quote, self._at):
            if quote[0] == '"' and self._text[self._at] == "\\":
                self._step()
            self._step()
        self._at += len(quote)
        # Up to two quotes may stand just before the three that end a string of several lines.
        while len(quote) > 1 and self._text.startswith(quote[0], self._at):
            self._at += 1
