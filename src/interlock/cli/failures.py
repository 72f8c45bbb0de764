"""The one exception with which a command ends other than well."""

from __future__ import annotations

from typing import Any

from interlock.cli.exit_codes import ExitCode


class Failure(Exception):
    """What went wrong, for people and for programs, and the exit code that says so.

    `text` replaces the message and the remedy where more than a sentence has to be said; `document` is what `--json`
    prints, the server's own problem document where there is one.
    """

    def __init__(
        self,
        code: ExitCode,
        message: str,
        *,
        remedy: str | None = None,
        text: str | None = None,
        document: dict[str, Any] | None = None,
    ) -> None:
        super().__init__(message)
        self.code = code
        self.message = message
        self.remedy = remedy
        self.text = text
        self._document = document

    @property
    def document(self) -> dict[str, Any]:
        """The failure as problem details."""
        if self._document is not None:
            return self._document
        document: dict[str, Any] = {
            "type": f"urn:interlock:cli:{self.code.name.lower().replace('_', '-')}",
            "title": self.code.name.replace("_", " ").capitalize(),
            "detail": self.message,
        }
        return document if self.remedy is None else {**document, "remedy": self.remedy}
