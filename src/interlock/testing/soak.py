"""A soak: many real VMs, random admitted operations, and a server that is killed again and again.

`python -m interlock.testing.soak --vms 20 --minutes 10` prints what it did as JSON, and ends with 1 if anything was
wrong: an acknowledged request that never ended, a VM that can neither be reached nor deleted, a damaged disk, or
anything left over once all of it was deleted.
"""

from __future__ import annotations

import argparse
import json
import random  # noqa: TID251 - the seed is an argument
import re
import subprocess
import sys
import tempfile
import threading
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Final

import httpx

from interlock.hypervisors.qemu.process import find_in
from interlock.testing.nano_guest import GREETING, nano_guest
from interlock.testing.real_server import RealServer, end_guests

_VOLUMES: Final = 6
_QUICK: Final = {
    "INTERLOCK_DRIVER_GUEST_SHUTDOWN_TIMEOUT_MS": "3000",
    "INTERLOCK_DRIVER_INSPECT_RETRY_MS": "100",
    "INTERLOCK_DRIVER_HEARTBEAT_MS": "1000",
}
_WAYS_TO_ACTIVE: Final[dict[str, tuple[str, dict[str, Any]]]] = {
    "building": ("start", {}),
    "stopped": ("start", {}),
    "error": ("start", {}),
    "paused": ("unpause", {}),
    "suspended": ("resume", {}),
    "rescued": ("unrescue", {}),
    "resized": ("confirm_resize", {}),
    "shelved": ("unshelve", {}),
    "shelved_offloaded": ("unshelve", {}),
    "soft_deleted": ("restore", {}),
}
_RARELY: Final = {"delete": 0.05, "force_delete": 0.05, "soft_delete": 0.1, "evacuate": 0.0, "create": 0.0}
"""How often an operation that ends a VM is taken when it was drawn."""
_ANY_NAME: Final = re.compile(r"[0-9a-f]{8}-[0-9a-f-]{27}|(?:vm|data)-[0-9]+")
"""What differs between two messages that say the same."""
_NOT_HERE: Final = {"reset_state", "migrate", "live_migrate", "live_migrate_abort", "live_migrate_force_complete"}
"""An administrator's lie about the state, and what needs another host."""


class Soak:
    """One run on one folder."""

    def __init__(self, folder: Path, vms: int, seed: int) -> None:
        self.server = RealServer(folder / "data", _QUICK)
        self.names = [f"vm-{number}" for number in range(vms)]
        self.chance = random.Random(seed)  # noqa: S311 - not for secrets
        self.counts: Counter[str] = Counter()
        self.wrong: list[str] = []
        self._folder = folder
        self._serving = threading.Event()
        self._over = threading.Event()
        self._lock = threading.Lock()
        self._acknowledged: list[str] = []
        self._made = 0

    # ---------------------------------------------------------------------------------------------- what it does

    def run(self, seconds: float, callers: int, kill_every_s: float) -> None:
        """Make the VMs, let callers ask while the server is killed now and then, and look at what is left."""
        self._begin()
        with ThreadPoolExecutor(callers) as pool:
            asking = [pool.submit(self._ask_until_over, self.chance.random()) for _ in range(callers)]
            self._kill_now_and_then(seconds, kill_every_s)
            self._over.set()
            self._serving.set()
            for one in asking:
                one.result()
        self._settle()
        self._judge_vms()
        self._judge_disks()
        self._clear()
        self.server.stop()
        self._judge_remains()

    def _begin(self) -> None:
        self.server.start()
        self._serving.set()
        kernel = nano_guest(self._folder)
        with Path(kernel.path).open("rb") as file:
            form = {"name": "nano", "kind": "kernel", "cmdline": "nano"}
            self.server.client.post("/v1/images", data=form, files={"kernel": file}).raise_for_status()
        for number in range(_VOLUMES):
            self.server.client.post("/v1/volumes", json={"name": f"data-{number}", "size_mib": 8}).raise_for_status()
        for name in self.names:
            self._create(name)

    def _create(self, name: str) -> None:
        wish = {"name": name, "image": "nano", "memory_mib": 64, "root_gib": 1}
        answer = self.server.client.post("/v1/instances", json=wish)
        if answer.status_code == httpx.codes.ACCEPTED:
            self._acknowledge(answer, "create")
        elif answer.status_code != httpx.codes.CONFLICT:
            self.wrong.append(f"create {name}: {answer.status_code} {answer.text[:300]}")

    def _kill_now_and_then(self, seconds: float, every_s: float) -> None:
        left = seconds
        while left > 0:
            lives_s = min(left, every_s * (0.5 + self.chance.random()))
            self._over.wait(lives_s)  # how long the server lives is what the soak is about
            left -= lives_s
            self._serving.clear()
            self.server.kill()
            self.counts["kills"] += 1
            self.server.start()
            self._serving.set()

    def _ask_until_over(self, seed: float) -> None:
        chance = random.Random(seed)  # noqa: S311 - not for secrets
        while not self._over.is_set():
            self._serving.wait()
            try:
                self._ask(chance)
            except (httpx.HTTPError, RuntimeError):
                # Killed under us: what was not acknowledged need not have happened.
                self.counts["broken connections"] += 1
            except Exception as error:  # noqa: BLE001 - a caller that breaks must be seen
                self.wrong.append(f"a caller broke: {error!r}")
                return

    def _ask(self, chance: random.Random) -> None:
        name = chance.choice(self.names)
        client = self.server.client
        found = client.get(f"/v1/instances/{name}/allowed")
        if found.status_code == httpx.codes.NOT_FOUND:
            self._create(name)
            return
        self._note_failure(found, f"allowed of {name}")
        offered = [one["operation"] for one in found.json().get("operations", ()) if one["disposition"] == "admitted"]
        choices = [operation for operation in offered if operation not in _NOT_HERE]
        if not choices:
            return
        operation = chance.choice(choices)
        if chance.random() >= _RARELY.get(operation, 1.0):
            return
        answer = self.server.submit(name, operation, **self._parameters(operation, name, chance))
        self._note_failure(answer, f"{operation} of {name}")
        if answer.status_code in {httpx.codes.ACCEPTED, httpx.codes.OK}:
            request_id = self._acknowledge(answer, operation)
            if request_id and chance.random() < 0.5:  # noqa: PLR2004 - the others go on while it is outstanding
                client.get(f"/v1/requests/{request_id}", params={"wait": "5s"})
        else:
            self.counts[f"{operation}: refused"] += 1

    def _parameters(self, operation: str, name: str, chance: random.Random) -> dict[str, Any]:
        volume = chance.randrange(_VOLUMES)
        with self._lock:
            self._made += 1
            label = f"{name}-made-{self._made}"
        makers: dict[str, Callable[[], dict[str, Any]]] = {
            "stop": lambda: {"hard": chance.random() < 0.5},  # noqa: PLR2004
            "reboot": lambda: {"hard": chance.random() < 0.5},  # noqa: PLR2004
            "attach_volume": lambda: {"volume": f"data-{volume}"},
            "detach_volume": lambda: {"volume": self._attached(name, "volumes")},
            "swap_volume": lambda: {"old": self._attached(name, "volumes"), "new": f"data-{volume}"},
            "detach_interface": lambda: {"interface": self._attached(name, "interfaces")},
            "resize": lambda: {"memory_mib": chance.choice((64, 72, 80)), "root_gib": chance.choice((1, 2))},
            "snapshot": lambda: {"name": label},
            "backup": lambda: {"backup_type": "daily", "rotation": 2},
            "set_metadata": lambda: {"set": {"note": label}},
            "set_password": lambda: {"user": "root", "password": "a secret of the soak"},
        }
        return makers.get(operation, dict)()

    def _attached(self, name: str, kind: str) -> str:
        """The id of one of the volumes or interfaces of a VM."""
        found = self.server.get(f"/v1/instances/{name}").get(kind) or ("none",)
        return str(found[0]["id"] if isinstance(found[0], dict) else found[0])

    def _acknowledge(self, answer: httpx.Response, operation: str) -> str | None:
        """Note what was admitted; the request's id, or None where what was asked for holds already."""
        request = answer.json().get("request")
        self.counts[operation] += 1
        if request is None:
            return None
        with self._lock:
            self._acknowledged.append(request["id"])
        return str(request["id"])

    def _note_failure(self, answer: httpx.Response, what: str) -> None:
        # Not ready yet (503) and full (507, 429) are honest answers; anything else in that range is a defect.
        if answer.status_code >= httpx.codes.INTERNAL_SERVER_ERROR and answer.status_code != 503:  # noqa: PLR2004
            self.wrong.append(f"{what}: {answer.status_code} {answer.text[:300]}")

    # -------------------------------------------------------------------------------------------- how it is judged

    def _settle(self) -> None:
        """Wait until everything that was acknowledged has ended."""
        ends: Counter[str] = Counter()
        for request_id in self._acknowledged:
            request = self.server.get(f"/v1/requests/{request_id}", wait="60s")
            if request["ended_at"] is None:
                self.wrong.append(f"never ended: {request['operation']} {request_id} {request['phase']}")
            ends[request["status"]] += 1
            if request["status"] == "failed":
                self.counts[f"{request['operation']}: failed"] += 1
                self.counts[f"failed: {_ANY_NAME.sub('…', request['message'] or '')[:110]}"] += 1
        self.counts.update({f"ended {status}": number for status, number in ends.items()})

    def _judge_vms(self) -> None:
        """Every VM is brought up and reached, or deleted."""
        for name in self.names:
            if self.server.client.get(f"/v1/instances/{name}").status_code == httpx.codes.NOT_FOUND:
                self.counts["gone at the end"] += 1
            elif self._reached(name):
                self.counts["reachable at the end"] += 1
            else:
                ended = self._carry_out(name, "delete")
                self.counts["deletable at the end"] += 1
                if ended != "succeeded":
                    self.wrong.append(f"{name} can neither be reached nor deleted: {ended}")

    def _reached(self, name: str) -> bool:
        for _ in range(4):
            instance = self.server.get(f"/v1/instances/{name}")
            if instance["locked_by"]:
                self._carry_out(name, "unlock")
            way = _WAYS_TO_ACTIVE.get(instance["vm_state"])
            if way is None:
                break
            self._carry_out(name, way[0], **way[1])
        before = self._greetings(name)
        return self._carry_out(name, "reboot", hard=True) == "succeeded" and self._greets(name, before)

    def _greets(self, name: str, before: int) -> bool:
        instance = self.server.get(f"/v1/instances/{name}")
        for _ in range(200):
            if self._greetings(name) > before:
                return True
            # Nothing but the console tells that a guest has come up; the wait is the server's, not a sleep of ours.
            self.server.get(f"/v1/instances/{name}", wait="0.1s", after_generation=instance["generation"])
        return False

    def _greetings(self, name: str) -> int:
        found = self.server.client.get(f"/v1/instances/{name}/console")
        return found.text.count(GREETING) if found.status_code == httpx.codes.OK else 0

    def _carry_out(self, name: str, operation: str, **parameters: Any) -> str:
        answer = self.server.submit(name, operation, **parameters)
        request = answer.json().get("request")
        if answer.status_code not in {httpx.codes.ACCEPTED, httpx.codes.OK}:
            return f"{answer.status_code} {answer.json().get('detail')}"
        if request is None:
            return "succeeded"
        ended = self.server.ended(request["id"])
        return str(ended["status"]) if ended["status"] == "succeeded" else f"{ended['status']}: {ended['message']}"

    def _judge_disks(self) -> None:
        for name in self.names:
            if self.server.client.get(f"/v1/instances/{name}").status_code == httpx.codes.OK:
                self._carry_out(name, "stop", hard=True)
        for path in sorted(self.server.folder.rglob("*.qcow2")):
            # 3: clusters that nobody needs any more, which a kill may leave and which harm nobody.
            ended = subprocess.run(["qemu-img", "check", "-q", str(path)], capture_output=True, check=False)  # noqa: S603, S607
            self.counts["disks checked"] += 1
            if ended.returncode not in {0, 3}:
                self.wrong.append(f"{path}: qemu-img check says {ended.returncode}: {ended.stderr.decode()[-300:]}")

    def _clear(self) -> None:
        for name in self.names:
            if self.server.client.get(f"/v1/instances/{name}").status_code == httpx.codes.OK:
                ended = self._carry_out(name, "force_delete")
                if ended != "succeeded":
                    self.wrong.append(f"{name} cannot be deleted: {ended}")
        for kind in ("volumes", "images"):
            for one in self.server.get(f"/v1/{kind}")["items"]:
                answer = self.server.client.delete(f"/v1/{kind}/{one['id']}")
                if answer.is_error:
                    self.wrong.append(f"{kind} {one['name']}: {answer.status_code} {answer.text[:200]}")

    def _judge_remains(self) -> None:
        vms = self.server.folder / "guests" / "vms"
        for folder in vms.glob("*"):
            process_id = find_in(folder / "inside")
            self.wrong.append(f"left over: {folder} (process {process_id})")
        for kind in ("images", "volumes", "dumps"):
            self.wrong += [f"left over: {path}" for path in (self.server.folder / kind).glob("*")]


def main() -> int:
    """Run one soak; 0 if nothing was wrong."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--vms", type=int, default=20)
    parser.add_argument("--minutes", type=float, default=10.0)
    parser.add_argument("--callers", type=int, default=8)
    parser.add_argument("--kill-every", type=float, default=15.0, metavar="S", help="on average, in seconds")
    parser.add_argument("--seed", type=int, default=1)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="interlock-soak-") as name:
        folder = Path(name)
        folder.chmod(0o711)  # QEMU runs as another user if we are root
        soak = Soak(folder, options.vms, options.seed)
        try:
            soak.run(options.minutes * 60, options.callers, options.kill_every)
        finally:
            soak.server.kill()
            end_guests(soak.server.folder)
    print(json.dumps({"wrong": soak.wrong, **dict(sorted(soak.counts.items()))}, indent=2))  # noqa: T201
    return 1 if soak.wrong else 0


if __name__ == "__main__":
    sys.exit(main())
