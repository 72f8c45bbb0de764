"""Verifies a policy in a subprocess, with time and memory limits."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import sys
from asyncio import subprocess
from collections.abc import Iterable
from pathlib import Path
from typing import Final

import msgspec
import structlog

from interlock.confinement.host_users import HostUsers, temporary_user
from interlock.confinement.sandbox import Account, Namespaces, View, confined, namespaces_for
from interlock.core.errors import OperationRejected
from interlock.core.operations import Operation
from interlock.core.policy_switches import PolicyBundle
from interlock.policies import verification
from interlock.policies.verification import Proof, Question

_LOG = structlog.get_logger(__name__)
_STDERR_BYTES_MAX: Final = 2000
_LIMITS: Final = ("--core=0", "--fsize=0", "--nofile=256")
_SIGNALLED: Final = 128
_TIME_ZONES: Final = "/usr/share/zoneinfo"
_SHORTER: Final = "Explore it for a shorter time, or not at all (0 seconds); `interlock policy explore` has no limit."


class PolicyVerifier:
    """Runs one process per policy, and kills it at the time limit."""

    def __init__(
        self,
        performs: Iterable[Operation],
        check_timeout_ms: int,
        memory_mib_max: int,
        users: HostUsers | None = None,
    ) -> None:
        """`users`: of this host, one of which each process gets as root; None: `nobody`."""
        self._performs = tuple(sorted(performs))
        self._check_timeout_ms = check_timeout_ms
        self._memory_mib_max = memory_mib_max
        self._users = users

    async def prove(self, bundle: PolicyBundle, explore_ms: int) -> Proof:
        """Read, check and explore a policy; a failure or time-out is returned as `Proof.wrong`."""
        question = Question(
            bundle=bundle, performs=self._performs, explore_ms=explore_ms, memory_mib_max=self._memory_mib_max
        )
        timeout_ms = self._check_timeout_ms + explore_ms
        try:
            with temporary_user(self._users, "policy verifier") as account:
                namespaced = await asyncio.to_thread(namespaces_for, account)
                process = await _start(_command(account, namespaced.namespaces))
                return await _answer(process, question, timeout_ms)
        except (OSError, OperationRejected) as error:
            return Proof(wrong=f"The policy could not be checked: no process can be started ({error}).")


async def _answer(process: subprocess.Process, question: Question, timeout_ms: int) -> Proof:
    try:
        async with asyncio.timeout(timeout_ms / 1000):
            stdout, stderr = await process.communicate(verification.encode(question))
    except TimeoutError:
        what = f"Checking the policy timed out after {timeout_ms / 1000:g} seconds."
        return Proof(wrong=what, remedy=_SHORTER)
    finally:
        await _end(process)
    return _proof(stdout, stderr, process.returncode)


def _command(account: Account | None, namespaces: Namespaces) -> list[str]:
    """Return the command of the verifier: it sees Python and its modules, and neither network nor server."""
    paths = [path for path in sys.path if path]
    program = [sys.executable, "-P", "-m", verification.__name__]
    view = View(
        folder=Path("/"), whole=False, files=tuple(map(Path, (sys.base_prefix, sys.prefix, *paths, _TIME_ZONES)))
    )
    marks = [f"PYTHONPATH={os.pathsep.join(paths)}", "PYTHONUTF8=1", "OPENBLAS_NUM_THREADS=1"]
    if namespaces is Namespaces.NONE:
        account = None  # another user may not be able to reach this Python
    return confined(program, view, _LIMITS, account, marks, namespaces=namespaces, dies_with_parent=True)


async def _start(command: list[str]) -> subprocess.Process:
    return await asyncio.create_subprocess_exec(
        *command,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        # Ctrl-C must reach the server only, which then ends this process.
        start_new_session=True,
    )


async def _end(process: subprocess.Process) -> None:
    if process.returncode is None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        await process.wait()


def _proof(stdout: bytes, stderr: bytes, code: int | None) -> Proof:
    if code == 0:
        with contextlib.suppress(msgspec.DecodeError):
            return msgspec.json.decode(stdout, type=Proof)
    tail = stderr[-_STDERR_BYTES_MAX:].decode("utf-8", "replace")
    _LOG.error("policy verification failed", code=code, stderr=tail)
    killed_by = 0 if code is None else (-code if code < 0 else code - _SIGNALLED)  # bubblewrap exits with 128 and more
    how = f"signal {killed_by}" if killed_by > 0 else f"exit code {code}"
    return Proof(wrong=f"Checking the policy failed ({how}).", remedy=f"See the server's log. {_SHORTER}")
