"""Going through a scenario, with or without the death of the server half-way."""

from __future__ import annotations

from typing import Any, Final

import httpx
import msgspec

from interlock.core.operations import CATALOGUE, Operation
from operation_tests import disks, power
from operation_tests.scenario import SECOND, VM, Scenario
from operation_tests.stage import Stage

SCENARIOS: Final = (*power.SCENARIOS, *disks.SCENARIOS)
"""Every proof of an operation on one host."""


class Outcome(msgspec.Struct, frozen=True, kw_only=True):
    """How going through a scenario came out."""

    status: str
    vm_state: str
    """`deleted` where it is gone."""
    seconds: float
    """From admission to the end, as the server measured it."""
    died: bool = False
    """Whether the server died on the way."""


def prove(stage: Stage, scenario: Scenario, dying_in: str | None = None) -> Outcome:
    """Prepare, ask, and hold that it did what it says; the server must be up, and is afterwards.

    With `dying_in`, a phase and moment of `crash_injection`, the server kills itself there and is started again: then
    the proof is that the next one finishes what the first began.

    Raises:
        AssertionError: something is not as the scenario says.
    """
    scenario.prepare(stage)
    before = scenario.before(stage)
    if dying_in is not None:
        stage.server.stop()
        stage.server.start(dying_in)
    request_id = _ask(stage, scenario)
    died = _wait(stage, request_id)
    if dying_in is not None:
        if died:
            stage.server.until_dead()
        else:
            stage.server.stop()
        stage.server.start()
    request = stage.server.ended(request_id or _latest(stage, scenario, before.instance.get("id", VM)))
    expected = "failed" if died and scenario.forgotten else "succeeded"
    assert request["status"] == expected, (request["status"], request["phase"], request["message"])
    if expected == "succeeded":
        scenario.verify(stage, before)
    else:
        power.undisturbed(stage, before)
    return Outcome(status=request["status"], vm_state=_vm_state(stage), seconds=float(request["duration_s"]), died=died)


def _ask(stage: Stage, scenario: Scenario) -> str | None:
    """Submit; the request's id, or None if the server died before it answered."""
    try:
        if not scenario.exists:
            return stage.create(VM)
        parameters = scenario.chosen(stage) if scenario.chosen else scenario.parameters
        answer = stage.server.submit(VM, scenario.operation.value, **parameters)
    except httpx.TransportError:
        return None
    assert answer.is_success, f"{scenario.operation.value}: {answer.status_code} {answer.text}"
    return str(answer.json()["request"]["id"])


def _wait(stage: Stage, request_id: str | None) -> bool:
    """Wait until the request has ended or the server has died; whether it died."""
    if request_id is None:
        return True
    try:
        stage.server.ended(request_id)
    except httpx.TransportError:
        return True
    return False


def _latest(stage: Stage, scenario: Scenario, reference: str) -> str:
    page: dict[str, Any] = stage.server.get(f"/v1/instances/{reference}/requests")
    return str(next(one["id"] for one in page["items"] if one["operation"] == scenario.operation.value))


def _vm_state(stage: Stage) -> str:
    found = stage.server.client.get(f"/v1/instances/{VM}")
    return "deleted" if found.status_code == httpx.codes.NOT_FOUND else str(found.json()["vm_state"])


def clear(stage: Stage) -> None:
    """Remove what a scenario left: the instances, and the images that were made of the first."""
    for name in (SECOND, VM):
        stage.discard(name)
    for image in stage.server.get("/v1/images")["items"]:
        if image.get("source_instance"):
            stage.server.client.delete(f"/v1/images/{image['id']}").raise_for_status()


def unproved(performs: frozenset[Operation]) -> set[Operation]:
    """What is performed, has phases, and has no proof here."""
    proved = {scenario.operation for scenario in SCENARIOS}
    return {operation for operation in performs if CATALOGUE[operation].phases} - proved
