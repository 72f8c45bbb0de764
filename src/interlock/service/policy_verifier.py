"""Verifies a policy in a subprocess, with time and memory limits."""

from __future__ import annotations

import asyncio
import contextlib
import os
import sys
from asyncio import subprocess
from collections.abc import Iterable
from typing import Final

import msgspec
import structlog

from interlock.core.operations import Operation
from interlock.core.policy_switches import PolicyBundle
from interlock.policies import verification
from interlock.policies.verification import Proof, Question

_LOG = structlog.get_logger(__name__)
_STDERR_BYTES_MAX: Final = 2000
_SHORTER: Final = "Explore it for a shorter time, or not at all (0 seconds); `interlock policy explore` has no limit."


class PolicyVerifier:
    """Runs one process per policy, and kills it at the time limit."""

    def __init__(self, performs: Iterable[Operation], check_timeout_ms: int, memory_mib_max: int) -> None:
        self._performs = tuple(sorted(performs))
        self._check_timeout_ms = check_timeout_ms
        self._memory_mib_max = memory_mib_max

    async def prove(self, bundle: PolicyBundle, explore_ms: int) -> Proof:
        """Read, check and explore a policy; a failure or time-out is returned as `Proof.wrong`."""
        question = Question(
            bundle=bundle, performs=self._performs, explore_ms=explore_ms, memory_mib_max=self._memory_mib_max
        )
        timeout_ms = self._check_timeout_ms + explore_ms
        try:
            process = await _start()
        except OSError as error:
            return Proof(wrong=f"The policy could not be checked: no process can be started ({error.strerror}).")
        try:
            async with asyncio.timeout(timeout_ms / 1000):
                stdout, stderr = await process.communicate(verification.encode(question))
        except TimeoutError:
            what = f"Checking the policy timed out after {timeout_ms / 1000:g} seconds."
            return Proof(wrong=what, remedy=_SHORTER)
        finally:
            await _end(process)
        return _proof(stdout, stderr, process.returncode)


async def _start() -> subprocess.Process:
    paths = os.pathsep.join(path for path in sys.path if path)
    environment = {**os.environ, "PYTHONPATH": paths, "OPENBLAS_NUM_THREADS": "1"}
    return await asyncio.create_subprocess_exec(
        *(sys.executable, "-P", "-m", verification.__name__),
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env=environment,
        # Ctrl-C must reach the server only, which then ends this process.
        start_new_session=True,
    )


async def _end(process: subprocess.Process) -> None:
    if process.returncode is None:
        with contextlib.suppress(ProcessLookupError):
            process.kill()
        await process.wait()


def _proof(stdout: bytes, stderr: bytes, code: int | None) -> Proof:
    if code == 0:
        with contextlib.suppress(msgspec.DecodeError):
            return msgspec.json.decode(stdout, type=Proof)
    tail = stderr[-_STDERR_BYTES_MAX:].decode("utf-8", "replace")
    _LOG.error("policy verification failed", code=code, stderr=tail)
    how = f"signal {-code}" if code is not None and code < 0 else f"exit code {code}"
    return Proof(wrong=f"Checking the policy failed ({how}).", remedy=f"See the server's log. {_SHORTER}")
