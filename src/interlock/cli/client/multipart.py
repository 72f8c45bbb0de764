"""Streaming encoder of `multipart/form-data` for uploads of any size."""

from __future__ import annotations

import secrets
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Final

_PIECE_BYTES: Final = 1024 * 1024


def _suffix(path: Path) -> str:
    """Return the file's suffix, which may name its format; the rest of the name is not sent."""
    return path.suffix.lower() if path.suffix.isascii() and path.suffix[1:].isalnum() else ""


class Form:
    """Text fields, then files, with a length known in advance."""

    def __init__(self, fields: Mapping[str, str], files: Mapping[str, Path]) -> None:
        """Raises `OSError` if a file is not accessible."""
        self._boundary = secrets.token_hex(16)
        self._text = b"".join(
            self._head(f'form-data; name="{name}"') + value.encode() + b"\r\n" for name, value in fields.items()
        )
        self._files = [
            (
                self._head(f'form-data; name="{name}"; filename="{name}{_suffix(path)}"', "application/octet-stream"),
                path,
                path.stat().st_size,
            )
            for name, path in files.items()
        ]
        self._tail = f"--{self._boundary}--\r\n".encode()

    def _head(self, disposition: str, kind: str | None = None) -> bytes:
        lines = [f"--{self._boundary}", f"Content-Disposition: {disposition}"]
        if kind is not None:
            lines.append(f"Content-Type: {kind}")
        return "\r\n".join([*lines, "", ""]).encode()

    @property
    def headers(self) -> dict[str, str]:
        length = len(self._text) + len(self._tail)
        length += sum(len(head) + size + len(b"\r\n") for head, _, size in self._files)
        return {
            "Content-Type": f"multipart/form-data; boundary={self._boundary}",
            "Content-Length": str(length),
        }

    def pieces(self, on_progress: Callable[[int, int], None]) -> Iterator[bytes]:
        """Yield the body; call `on_progress` with the bytes of files sent and their total after each piece."""
        total = sum(size for _, _, size in self._files)
        sent = 0
        yield self._text
        for head, path, size in self._files:
            yield head
            left = size
            with path.open("rb") as file:
                while left and (piece := file.read(min(left, _PIECE_BYTES))):
                    yield piece
                    left -= len(piece)
                    sent += len(piece)
                    on_progress(sent, total)
            if left:
                raise OSError(f"{path} was truncated during the upload")
            yield b"\r\n"
        yield self._tail
