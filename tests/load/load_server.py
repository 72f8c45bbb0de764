"""A real server on a bad host, in a process of its own: what the load of `load` is put on.

Its guests are simulated and much goes wrong with them, from a seed; its policy is `standard` with every threshold cut
to about a second, so that takeovers happen within a test. It listens on a free port of the loopback address and is
told over standard input: `calm` ends the faults, waits until everything has ended and answers what has not, and
`stop` ends the server. What is asked of it over HTTP, and what is made of the answers, is not here.
"""

from __future__ import annotations

import asyncio
import io
import json
import re
import sys
from importlib import resources
from pathlib import Path
from typing import Any, Final

import uvloop

from in_process.trusting_verifier import TrustingProver
from interlock.config import Config, DriverConfig, HttpConfig
from interlock.core.records import Image, Instance
from interlock.core.states import PowerState, VmState
from interlock.hypervisors.simulated import FaultRates, Method, SimulatedHost, SimulatedHypervisor
from interlock.ports import InstanceFilter, Volume
from interlock.server import ADMIN_TOKEN, Server
from interlock.service.server_log import configure_logging

IMAGE: Final = Image(id="nothing", name="nothing", kind="kernel", path="/nowhere", size_bytes=0, sha256="0" * 64)
VOLUMES: Final = tuple(f"volume-{number}" for number in range(6))
RATES: Final = FaultRates(
    slow=0.10,
    hangs=0.03,
    answer_lost=0.02,
    refuses=0.02,
    panics=0.05,
    vanishes=0.1,
    ignores=0.03,
    delay_ms_max=400,
    thaw_after_ms_max=4_000,
)
_DELAYS_MS: Final[dict[Method, int]] = dict.fromkeys((method for method in Method if method is not Method.INSPECT), 5)
_ANSWER_TIMEOUT_S: Final = 0.2
_DRIVER: Final = DriverConfig(guest_shutdown_timeout_ms=1_500, heartbeat_ms=200, inspect_retry_ms=50, drain_ms=1_000)
_HTTP: Final = HttpConfig(token_requests_per_s=1e6, requests_max=1_000, token_requests_max=1_000)
"""Nobody is refused: what is judged is what the answers promise."""
_SETTLE_S: Final = 15.0
_PAGE: Final = 500


def quick_policy() -> str:
    """The policy `standard` with about a second in place of every threshold, as the text of a policy file."""
    text = (resources.files("interlock.policies") / "builtin" / "standard.toml").read_text(encoding="utf-8")
    for pattern, instead in (
        (r'^name = "standard"$', 'name = "load"'),
        (r'^threshold = ".*"$', 'threshold = "1s"'),
        (r'^silent_for = ".*"$', 'silent_for = "300ms"'),
        (r'^grace = ".*"$', ""),
        (r'^verdict = "preempt"$', 'verdict = "preempt"\ngrace = "500ms"'),
    ):
        text, count = re.subn(pattern, instead, text, flags=re.MULTILINE)
        if not count:
            raise RuntimeError(f"The policy `standard` has nothing like {pattern} any more.")
    return text


def main(arguments: list[str] | None = None) -> None:
    """Serve from the folder and with the seed that are named, until told to stop."""
    folder, seed = (sys.argv[1:] if arguments is None else arguments)[:2]
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(_serve(Path(folder), int(seed)))


async def _serve(folder: Path, seed: int) -> None:
    policy = folder / "load.toml"
    policy.write_text(quick_policy(), encoding="utf-8")
    config = Config(
        data_dir=str(folder / "data"),
        listen_port=0,
        hypervisor="simulated",
        host="load",
        policy=str(policy),
        log_format="json",
        driver=_DRIVER,
        http=_HTTP,
    )
    configure_logging(config)
    host = SimulatedHost(seed=seed, rates=RATES)
    hypervisor = SimulatedHypervisor(host, delays_ms=_DELAYS_MS, power_off_ms=50, answer_timeout_s=_ANSWER_TIMEOUT_S)
    server = Server(config, hypervisor, prover=TrustingProver())
    started = asyncio.Event()
    serving = asyncio.create_task(server.serve(started))
    waiting = asyncio.create_task(started.wait())
    await asyncio.wait((serving, waiting), return_when=asyncio.FIRST_COMPLETED)
    await _furnish(server)
    _say({"url": server.url, "secret": (server.folder / ADMIN_TOKEN).read_text(encoding="utf-8").strip()})
    while (told := (await asyncio.to_thread(sys.stdin.readline)).strip()) == "calm":
        _calm(host)
        _say({"stuck": await _settled(server), "differences": await _differences(server, host)})
    if told == "stop":
        server.stop()
    await serving


def _say(what: dict[str, Any]) -> None:
    sys.stdout.write(json.dumps(what) + "\n")
    sys.stdout.flush()


async def _furnish(server: Server) -> None:
    """Keep an image and the volumes in the record; simulated guests need no files of them."""
    await server.store.images.put(IMAGE)
    for name in VOLUMES:
        path = f"simulated:{name}"
        volume = Volume(id=name, name=name, project="default", path=path, size_bytes=1 << 20, created_at_ms=0)
        await server.store.volumes.put(volume)


def _calm(host: SimulatedHost) -> None:
    host.faults.calm()
    for instance_id in tuple(host.guests):
        host.thaw(instance_id)


async def _settled(server: Server) -> list[str]:
    """Wait until nothing is outstanding; what still is when that took too long."""
    deadline = asyncio.get_running_loop().time() + _SETTLE_S
    while unsettled := [one for one in await server.store.unsettled() if one.outstanding]:
        left_s = deadline - asyncio.get_running_loop().time()
        if left_s <= 0:
            return [_plight(instance) for instance in unsettled]
        request = unsettled[0].outstanding[0]

        async def ended(request_id: str = request.id) -> bool | None:
            latest = await server.store.request(request_id)
            return True if latest is None or latest.ended_at_ms is not None else None

        await server.instances.watch.until(unsettled[0].id, ended, int(left_s * 1000) + 1)
    return []


def _plight(instance: Instance) -> str:
    """What a stuck instance waits for, and where those that should see to it are."""
    outstanding = [f"{one.operation.value} {one.id} {one.status.value}" for one in instance.outstanding]
    places = []
    for task in asyncio.all_tasks():
        if instance.id in task.get_name():
            stack = io.StringIO()
            task.print_stack(file=stack)
            places.append(f"{task.get_name()}: {stack.getvalue()}")
    return f"{instance.id}: {outstanding}\n{chr(10).join(places) or 'no task sees to it'}"


async def _differences(server: Server, host: SimulatedHost) -> list[str]:
    """What the record and the host do not agree on, once everything has settled."""
    living: dict[str, Any] = {}
    cursor: str | None = None
    while True:
        page = await server.store.instances(InstanceFilter(), _PAGE, cursor)
        living |= {instance.id: instance for instance in page.items}
        cursor = page.next_cursor
        if cursor is None:
            break
    found = [f"stray: {stray}" for stray in set(host.guests) - set(living)]
    for instance in living.values():
        guest = host.guests.get(instance.id)
        power = "none" if guest is None else guest.seen.value
        wanted = {VmState.ACTIVE: "running", VmState.PAUSED: "paused"}.get(instance.vm_state)
        if wanted is not None and power != wanted:
            found.append(f"{instance.id} is {instance.vm_state.value}, and its guest {power}")
        if instance.vm_state is VmState.STOPPED and power in {"running", "paused"}:
            found.append(f"{instance.id} is stopped, and its guest {power}")
    claims = {volume.id: volume.attached_to for volume in await server.store.volumes.all()}
    for guest in host.guests.values():
        found += [
            f"{guest.instance_id} has the disk {disk}, which is claimed by {claims[disk]}"
            for disk in guest.disks
            if guest.power is not PowerState.NONE and disk in claims and claims[disk] != guest.instance_id
        ]
    return found


if __name__ == "__main__":
    main()
