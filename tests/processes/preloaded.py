"""Python processes that are forked from one that has imported Interlock: importing is most of a program's start.

Each is `python WORDS` in every other respect: it runs the program as `__main__`, with an environment, a standard error
and an exit code of its own, and shares nothing with the others.
"""

from __future__ import annotations

import contextlib
import ctypes
import io
import multiprocessing
import os
import runpy
import sys
import tempfile
from collections.abc import Mapping
from multiprocessing.connection import Connection
from multiprocessing.context import ForkServerContext, ForkServerProcess
from pathlib import Path
from subprocess import CompletedProcess, TimeoutExpired
from typing import Final

_IMPORTED: Final = [
    *("pytest", "interlock.server", "interlock.agent", "interlock.cli.application"),
    *(
        "conformance.qemu_workbench",
        "processes.crash_injection",
        "recovery.dying_in_phase",
        "recovery.simulated_server",
    ),
]
"""What is imported once for all processes: nothing that starts a thread, or that draws random numbers."""

NETWORK: Final = "TEST_NETWORK_NAMESPACE"
"""An environment variable with the path of the network namespace that a process is to run in."""


def fork_server() -> ForkServerContext:
    """Return what forks processes that have imported Interlock and the programs of the tests."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(_IMPORTED)
    return context


class PreloadedProcess:
    """As `subprocess.Popen((sys.executable, *words), env=environment, stderr=PIPE, text=True)`.

    Args:
        words: a script, or `-m` and a module, or `-c` and code; and its arguments.
        environment: all of its environment variables.
        output: the file that it writes its standard output to, instead of that of the tests.
    """

    def __init__(self, words: tuple[str, ...], environment: Mapping[str, str], output: Path | None = None) -> None:
        context = fork_server()
        read, errors = context.Pipe(duplex=False)
        self._process: ForkServerProcess = context.Process(
            target=_run, args=(words, dict(environment), errors, output), daemon=True
        )
        with read, errors:
            self._process.start()
            self.stderr: io.TextIOWrapper = os.fdopen(os.dup(read.fileno()), encoding="utf-8")
        assert self._process.pid is not None
        self.pid = self._process.pid

    def poll(self) -> int | None:
        """Return the exit code, -N if signal N ended it, or None if it runs."""
        return self._process.exitcode

    def wait(self, timeout: float | None = None) -> int:
        """Return the exit code once it has ended. Raises `subprocess.TimeoutExpired` after so many seconds."""
        self._process.join(timeout)
        if (code := self._process.exitcode) is None:
            raise TimeoutExpired(self._process.name, timeout or 0.0)
        return code

    def rest(self) -> str:
        """Return what it still writes on standard error, when it has closed that."""
        with self.stderr:
            return self.stderr.read()

    def send_signal(self, number: int) -> None:
        """Send a signal, unless it has ended."""
        if self.poll() is None:
            os.kill(self.pid, number)

    def kill(self) -> None:
        self._process.kill()

    def terminate(self) -> None:
        self._process.terminate()


def run(words: tuple[str, ...], environment: Mapping[str, str], timeout: float) -> CompletedProcess[str]:
    """As `subprocess.run` of such words, which captures output and errors as text and does not check the exit code."""
    with tempfile.NamedTemporaryFile("r", encoding="utf-8") as output:
        process = PreloadedProcess(words, environment, Path(output.name))
        errors = process.rest()
        return CompletedProcess(words, process.wait(timeout), output.read(), errors)


def exit_code(*words: str) -> int:
    """Run such words to their end, and return the exit code. Standard error is passed on to that of this process."""
    process = PreloadedProcess(words, os.environ)
    with process.stderr:
        code = process.wait()
        # Processes that it has started may have it open still.
        os.set_blocking(process.stderr.fileno(), False)
        with contextlib.suppress(BlockingIOError):
            sys.stderr.write(os.read(process.stderr.fileno(), 1 << 16).decode())
    return code


def _run(words: tuple[str, ...], environment: dict[str, str], errors: Connection, output: Path | None) -> None:
    os.dup2(errors.fileno(), sys.stderr.fileno())
    errors.close()
    if output is not None:
        with output.open("wb") as file:
            os.dup2(file.fileno(), sys.stdout.fileno())
    os.environ.clear()
    os.environ.update(environment)
    if path := os.environ.pop(NETWORK, ""):
        namespace = os.open(path, os.O_RDONLY)
        if ctypes.CDLL(None, use_errno=True).setns(namespace, 0):
            raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()), path)
        os.close(namespace)
    if words[0] == "-m":
        sys.argv[:] = words[1:]
        runpy.run_module(words[1], run_name="__main__", alter_sys=True)
    elif words[0] == "-c":
        sys.argv[:] = ("-c", *words[2:])
        exec(words[1], {"__name__": "__main__"})
    else:
        sys.argv[:] = words
        runpy.run_path(words[0], run_name="__main__")
