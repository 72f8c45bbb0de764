"""`--restart`: what is done when a guest ends by itself, in one word, and the words for it."""

from __future__ import annotations

from typing import Final

import click

from interlock.core.restart_policy import OnCrash, OnPowerOff, RestartPolicy

WORDS: Final[dict[str, RestartPolicy]] = {
    "never": RestartPolicy(),
    "on-crash": RestartPolicy(on_crash=OnCrash.RESTART),
    "always": RestartPolicy(on_crash=OnCrash.RESTART, on_power_off=OnPowerOff.RESTART),
}

restart_option = click.option(
    "--restart",
    type=click.Choice(tuple(WORDS)),
    help="Start it again when it crashed, or always when it ended by itself. What somebody asked for is not undone.",
)


def spoken_policy(policy: RestartPolicy | None, restarts: int) -> str | None:
    """The policy in words, with how often it did something lately; None if nothing is ever done."""
    if policy is None:
        return None
    parts = []
    if policy.on_crash is not OnCrash.LEAVE:
        parts.append(f"{policy.on_crash.value} when it crashed")
    if policy.on_power_off is not OnPowerOff.LEAVE:
        parts.append("restart when it powered itself off")
    if not parts:
        return None
    limit = f"at most {policy.restarts_max} times within {policy.window_s} s"
    return f"{', '.join(parts)}; {limit}" + (f", {restarts} so far" if restarts else "")
