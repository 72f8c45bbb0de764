"""`interlock policy key`, and the certificates that `explore` writes and `load` sends."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
import msgspec

from interlock.cli.commands.policy.group import policy_commands
from interlock.cli.context import Invocation, with_json
from interlock.cli.failures import ExitCode, Failure
from interlock.cli.options.configuration import errors_as_failures

if TYPE_CHECKING:
    from interlock.policies.model_checker import Exploration


@policy_commands.command()
@click.argument("file", type=click.Path(path_type=Path), metavar="FILE")
@with_json
def key(invocation: Invocation, *, file: Path) -> None:
    """Make a key that signs certificates, and print its public half.

    The private key is written to FILE, which must not exist. `interlock policy explore --certificate --key FILE` signs
    with it; a server accepts its certificates if `policy_keys` in its configuration has the public key.
    """
    from interlock.policies.certificates import new_private_key, public_text, read_private_key

    pem = new_private_key()
    try:
        descriptor = os.open(file, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    except OSError as error:
        raise Failure(
            ExitCode.USAGE, f"Cannot write {file}: {error.strerror}.", remedy="Choose another file."
        ) from None
    with os.fdopen(descriptor, "wb") as written:
        written.write(pem)
    public_key = public_text(read_private_key(pem))
    if invocation.json:
        invocation.emit({"file": str(file), "public_key": public_key})
    else:
        invocation.echo(public_key)


def read_key(path: Path) -> Any:
    """Return the private key in a file. Raises `Failure`."""
    from interlock.policies.certificates import read_private_key

    with errors_as_failures():
        return read_private_key(_read(path))


def write_certificate(
    name: str, found: Exploration, faults_max: int | None, path: Path, private_key: Any, valid_days: int
) -> None:
    """Write the certificate of an exploration, signed if there is a key. Raises `Failure`."""
    from datetime import UTC, datetime

    from interlock.policies.certificates import SignedCertificate, certify, sign
    from interlock.policies.language.loader import compile_named

    now = datetime.now(UTC)  # noqa: TID251 - there is no store, and another machine compares it with its own time
    with errors_as_failures():
        certificate = certify(compile_named(name), found, faults_max, now, valid_days)
    signed = SignedCertificate(certificate=certificate) if private_key is None else sign(certificate, private_key)
    text = msgspec.json.format(msgspec.json.encode(signed), indent=2)
    try:
        path.write_bytes(text + b"\n")
    except OSError as error:
        raise Failure(
            ExitCode.USAGE, f"Cannot write {path}: {error.strerror}.", remedy="Choose another file."
        ) from None


def read_certificate(path: Path) -> Any:
    """Return a certificate as JSON values; the server checks it. Raises `Failure`."""
    try:
        return msgspec.json.decode(_read(path))
    except msgspec.DecodeError as error:
        raise Failure(
            ExitCode.USAGE,
            f"Invalid certificate {path}: {error}.",
            remedy="Write one with `interlock policy explore --certificate FILE --key KEY`.",
        ) from None


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise Failure(ExitCode.USAGE, f"Cannot read {path}: {error.strerror}.") from None
