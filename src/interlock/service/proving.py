"""Having a policy proved by another process, and bearing with whatever becomes of that."""

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
from interlock.policies import proving
from interlock.policies.proving import Proof, Question

_LOG = structlog.get_logger(__name__)
_TOLD_BYTES: Final = 2000
_SHORTER: Final = "Explore it for a shorter time, or not at all (0 seconds); `interlock policy explore` has no limit."


class Prover:
    """Starts one process for each policy, and ends it when its time is up."""

    def __init__(self, performs: Iterable[Operation], check_timeout_ms: int, memory_mib_max: int) -> None:
        self._performs = tuple(sorted(performs))
        self._check_timeout_ms = check_timeout_ms
        self._memory_mib_max = memory_mib_max

    async def prove(self, bundle: PolicyBundle, explore_ms: int) -> Proof:
        """Read, check and walk a policy; that this could not be done to its end is an answer too."""
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
                out, told = await process.communicate(proving.encode(question))
        except TimeoutError:
            what = f"Checking the policy did not end within {timeout_ms / 1000:g} seconds."
            return Proof(wrong=what, remedy=_SHORTER)
        finally:
            await _end(process)
        return _understood(out, told, process.returncode)


async def _start() -> subprocess.Process:
    paths = os.pathsep.join(path for path in sys.path if path)
    environment = {**os.environ, "PYTHONPATH": paths, "OPENBLAS_NUM_THREADS": "1"}
    return await asyncio.create_subprocess_exec(
        *(sys.executable, "-P", "-m", proving.__name__),
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env=environment,
        # Ctrl-C is meant for the server, which ends this itself.
        start_new_session=True,
    )


async def _end(process: subprocess.Process) -> None:
    if process.returncode is None:
        with contextlib.suppress(ProcessLookupError):
            process.kill()
        await process.wait()


def _understood(out: bytes, told: bytes, code: int | None) -> Proof:
    if code == 0:
        with contextlib.suppress(msgspec.DecodeError):
            return msgspec.json.decode(out, type=Proof)
    _LOG.error("the check of a policy broke", code=code, said=told[-_TOLD_BYTES:].decode("utf-8", "replace"))
    how = f"signal {-code}" if code is not None and code < 0 else f"exit code {code}"
    return Proof(
        wrong=f"The check of the policy ended before it was done ({how}).",
        remedy=f"The server's log says more. {_SHORTER}",
    )
