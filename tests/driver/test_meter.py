"""How often a progress is kept and told: bounded, whatever goes on for how long."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

from in_process.virtual_time import run_in_virtual_time
from interlock.core.records import TransferProgress
from interlock.driver.progress import ProgressReporter

MIB = 1024**2


def kept(report: Callable[[ProgressReporter, int], None], seconds: int) -> list[TransferProgress]:
    """What is kept of something that reports five times a second for so long."""
    found: list[TransferProgress] = []

    async def main() -> None:
        async def keep(moved: TransferProgress) -> None:
            found.append(moved)

        meter = ProgressReporter(keep, 1_000, 15_000)
        for step in range(seconds * 5):
            report(meter, step)
            await asyncio.sleep(0.2)
        await meter.close()

    run_in_virtual_time(main())
    return found


def test_what_gets_on_is_told_once_a_second() -> None:
    found = kept(lambda meter, step: meter(step * MIB, 500 * MIB), 100)
    assert 90 <= len(found) <= 100


def test_what_hardly_gets_on_is_told_less_and_less_often() -> None:
    """Ten minutes at 97 per cent are not six hundred events."""
    found = kept(lambda meter, step: meter(970 * MIB + step % 3, 1_000 * MIB, detail=f"pass {step}"), 600)
    assert 30 <= len(found) <= 50
    assert found[-1].detail is not None


def test_a_warning_that_comes_or_goes_is_told_at_once() -> None:
    def report(meter: ProgressReporter, step: int) -> None:
        meter(970 * MIB + step % 3, 1_000 * MIB, warning="does not converge" if 500 <= step < 700 else None)

    found = kept(report, 200)
    warned = [moved.warning for moved in found]
    assert "does not converge" in warned
    assert warned[-1] is None
    assert len(found) <= 25


def test_what_has_no_total_is_told_while_it_grows() -> None:
    found = kept(lambda meter, step: meter(step * MIB), 60)
    assert 20 <= len(found) <= 60
