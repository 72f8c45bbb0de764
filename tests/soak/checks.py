"""What must be true at the end: everything ended, every VM reached or deleted, disks whole, and nothing left over."""

from __future__ import annotations

import subprocess
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any, Final

import httpx

from interlock.hypervisors.remote.file_cache import RESUMABLE
from soak.environment import HERE, Ground, Vm, is_free, until
from soak.operations import ROTATION, Asking
from soak.report import Book
from soak.split_brain_monitor import Doubles, computed, is_stopped, moves

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
_STEPS_MAX: Final = 4
_AT_A_TIME: Final = 2
_ANSWER_S: Final = 60.0
_ENDS_BY_ITSELF: Final = ("watchdog", "console_log.py")
_MOVES_WITHIN_S: Final = 10.0
"""Within which time a guest that runs is seen to; one of many on a busy machine is seldom given a processor."""
_LEAKS: Final = 3
"""How the image tool ends when there are clusters in a file that nothing uses, which a kill may leave and which harm
nobody."""


class Judging:
    """Goes through the promises one after the other, once nobody asks and nothing is killed any more."""

    def __init__(self, ground: Ground, book: Book, asking: Asking) -> None:
        self._ground = ground
        self._book = book
        self._asking = asking
        self._doubles = Doubles(ground.guests, book)

    def judge(self) -> None:
        """All of it; nothing of the soak is left when this returns."""
        with self._book.timed("settling"):
            self._settle()
        self._judge_guests()
        self._judge_backups()
        with self._book.timed("reaching"), ThreadPoolExecutor(_AT_A_TIME) as pool:
            list(pool.map(self._judge_vm, self._ground.vms.values()))
        self._doubles.look()
        self._judge_places()
        self._judge_disks()
        with self._book.timed("clearing"):
            self._clear()
        self._judge_ports()
        self._stop()
        self._judge_remains()

    # -------------------------------------------------------------------------------------------------- requests

    def _settle(self) -> None:
        """Wait until everything that was acknowledged has ended."""
        for request_id in self._book.acknowledged:
            request = self._ground.ended(request_id)
            if request["ended_at"] is None:
                self._book.complain(f"never ended: {request['operation']} {request_id} {request['phase']}")
            self._book.note_end(request)

    def _carry_out(self, name: str, operation: str, **parameters: Any) -> str:
        """`succeeded`, or why not."""
        answer = self._ground.server.submit(name, operation, **parameters)
        if not answer.is_success:
            return f"{answer.status_code} {answer.json().get('detail')}"
        request = answer.json().get("request")
        if request is None:
            return "succeeded"
        ended = self._ground.ended(request["id"])
        return "succeeded" if ended["status"] == "succeeded" else f"{ended['status']}: {ended['message']}"

    # ------------------------------------------------------------------------------------------------------- VMs

    def _judge_vm(self, vm: Vm) -> None:
        """It is brought up and reached, and has its disk; or it can be deleted."""
        if self._ground.instance(vm.name) is None:
            self._book.count("gone at the end")
            return
        trouble = self._reach(vm)
        if trouble is None:
            self._book.count("reachable at the end")
            self._judge_mark(vm)
            return
        self._book.count(f"deletable at the end: {trouble}")
        ended = self._carry_out(vm.name, "delete")
        if ended != "succeeded":
            self._book.complain(f"{vm.name} can neither be reached ({trouble}) nor deleted: {ended}")

    def _judge_guests(self) -> None:
        """Guests do what their records say, on the host that they name, before anything more is asked of them."""
        for name in self._ground.vms:
            if not until(partial(self._is_as_told, name), partial(self._signs, name)):
                instance = self._ground.instance(name) or {}
                keys = ("vm_state", "host", "power_state", "guest_trouble")
                told = ", ".join(str(instance.get(key)) for key in keys)
                holders = self._doubles.holders().get(instance.get("id", ""), [])
                found = [f"{one.host}: {'runs' if moves(one) else 'stands still'}" for one in holders]
                self._book.complain(f"{name} is said to be {told}, and is found {found}")

    def _is_as_told(self, name: str) -> bool:
        """Whether a VM that is active runs, and one that is paused stands still; one whose process was stopped is said
        to give no answer.
        """
        instance = self._ground.instance(name)
        if instance is None or instance["vm_state"] not in {"active", "paused"}:
            return True
        holders = self._doubles.holders().get(instance["id"], [])
        self._book.count(f"seen to be {instance['vm_state']}")
        if [one.host for one in holders] != [instance["host"]]:
            return False
        if is_stopped(holders[0]):
            return bool(instance["guest_trouble"] == "not_responding")
        active = instance["vm_state"] == "active"
        return moves(holders[0], _MOVES_WITHIN_S if active else 0) is active

    def _signs(self, name: str) -> tuple[object, ...]:
        """What changes as long as a VM gets anywhere: its record, what its guest has said, and what that computes."""
        holders = self._doubles.holders().get((self._ground.instance(name) or {}).get("id", ""), [])
        found = tuple((one.process_id, computed(one)) for one in holders)
        return self._ground.record(name), self._ground.greetings(name), found

    def _reach(self, vm: Vm) -> str | None:
        """Bring it up and have it greet; what is in the way of that."""
        for _ in range(_STEPS_MAX):
            instance = self._ground.server.get(f"/v1/instances/{vm.name}")
            if instance["locked_by"]:
                self._carry_out(vm.name, "unlock")
            way = _WAYS_TO_ACTIVE.get(instance["vm_state"])
            if way is None:
                break
            ended = self._carry_out(vm.name, way[0], **way[1])
            if ended != "succeeded":
                return f"{way[0]} of what is {instance['vm_state']}: {ended}"
        before = self._ground.greetings(vm.name)
        ended = self._carry_out(vm.name, "reboot", hard=True)
        if ended != "succeeded":
            return f"reboot: {ended}"
        if not until(lambda: self._ground.greetings(vm.name) > before, partial(self._signs, vm.name)):
            holders = self._doubles.holders().get(self._ground.server.get(f"/v1/instances/{vm.name}")["id"], [])
            found = " and ".join(
                "its processors run" if moves(one) else "its processors stand still" for one in holders
            )
            return f"its guest says nothing, {found or 'and nothing holds it'}"
        return self._unanswered(vm)

    def _unanswered(self, vm: Vm) -> str | None:
        """What is wrong with its port, for a VM that runs."""
        if vm.port is None:
            return None
        if is_free(vm.port):
            self._book.complain(f"{vm.name} runs, and nobody listens on its port {vm.port}")
        elif vm.small:
            try:
                httpx.get(f"http://127.0.0.1:{vm.port}/cgi-bin/status", timeout=_ANSWER_S).raise_for_status()
            except httpx.HTTPError as error:
                return f"its guest does not answer on its port: {error!r}"
        self._book.count("ports that listened")
        return None

    def _judge_mark(self, vm: Vm) -> None:
        """Stop it, and see that what was first written on the disk of a small one is there."""
        ended = self._carry_out(vm.name, "stop", hard=True)
        if ended != "succeeded":
            self._book.complain(f"{vm.name} cannot be stopped: {ended}")
        elif vm.small and vm.name not in self._asking.disturbed:
            mark = self._ground.read_mark(vm.name)
            self._book.count("marks found")
            if mark != vm.mark:
                self._book.complain(f"{vm.name} has {mark!r} on its disk instead of {vm.mark!r}")

    def _judge_places(self) -> None:
        """Each instance is on the host that its record names, and nowhere else."""
        expected = {}
        for name in self._ground.vms:
            instance = self._ground.instance(name)
            if instance is not None:
                expected[instance["id"]] = {instance["host"]}

        def found() -> dict[str, set[str]]:
            return {
                one: {host for host in self._ground.folders if self._ground.files(host, one).exists()}
                for one in expected
            }

        # What is left where an instance was is removed by and by.
        if not until(lambda: found() == expected):
            for one, hosts in found().items():
                if hosts != expected[one]:
                    self._book.complain(f"{one} is recorded on {expected[one]} and has files on {hosts}")
        for instance_id, holders in self._doubles.holders().items():
            self._book.complain(f"{instance_id} is stopped and held by {[one.process_id for one in holders]}")

    # ----------------------------------------------------------------------------------------------------- disks

    def _judge_backups(self) -> None:
        """No more backups are kept than were asked for, unless they are in use."""
        items = self._ground.server.get("/v1/images")["items"]
        booted = {one["image"]["id"] for one in self._ground.server.get("/v1/instances")["items"]}
        for name in self._ground.vms:
            instance = self._ground.instance(name)
            if instance is not None:
                own = [one for one in items if one["source_instance"] == instance["id"] and one.get("backup_type")]
                if len([one for one in own if one["id"] not in booted]) > ROTATION:
                    self._book.complain(f"{name} has {len(own)} backups, and {ROTATION} are to be kept")

    def _judge_disks(self) -> None:
        for folder in self._ground.folders.values():
            for path in sorted(folder.rglob("*.qcow2")):
                ended = subprocess.run(["qemu-img", "check", "-q", str(path)], capture_output=True, check=False)
                self._book.count("disks checked")
                if ended.returncode not in {0, _LEAKS}:
                    words = ended.stderr.decode()[-300:]
                    self._book.complain(f"{path}: qemu-img check says {ended.returncode}: {words}")

    # -------------------------------------------------------------------------------------------------- leavings

    def _clear(self) -> None:
        """Delete everything."""
        for name in self._ground.vms:
            if self._ground.instance(name) is not None:
                ended = self._carry_out(name, "force_delete")
                if ended != "succeeded":
                    self._book.complain(f"{name} cannot be deleted: {ended}")
        for kind in ("volumes", "images"):
            for one in self._ground.server.get(f"/v1/{kind}")["items"]:
                answer = self._ground.server.client.delete(f"/v1/{kind}/{one['id']}")
                if answer.is_error:
                    self._book.complain(f"{kind} {one['name']}: {answer.status_code} {answer.text[:200]}")

    def _judge_ports(self) -> None:
        for port in self._ground.ports:
            if not is_free(port):
                self._book.complain(f"somebody listens on {port}, which was forwarded to a VM that is deleted")

    def _stop(self) -> None:
        """Stop all hosts, as an operator does who has seen that the copies of deleted images are gone."""
        for agent in self._ground.agents.values():
            copies = agent.folder / "images"
            until(lambda: not any(copies.glob("*")))  # noqa: B023 - what is left for good is complained of
            agent.stop()
        self._ground.server.stop()

    def _judge_remains(self) -> None:
        for host, folder in self._ground.folders.items():
            kinds = ("images", "spool", "dumps") if host != HERE else ("images", "volumes", "dumps")
            for place in (folder / "guests" / "vms", *(folder / kind for kind in kinds)):
                for path in place.glob("*"):
                    if RESUMABLE.fullmatch(path.name) is None:  # kept for an hour after its agent was killed
                        self._book.complain(f"left over on {host}: {path}")
        if self._ground.shared is not None:
            for path in (self._ground.shared / "instances").glob("*"):
                self._book.complain(f"left over: {path}")
        for process_id, words in self._processes():
            self._book.complain(f"left over: process {process_id}: {words}")

    def _processes(self) -> list[tuple[int, str]]:
        """What still runs of the soak, but for what ends by itself a minute after the last guest."""
        found = []
        folders = self._ground.folders.values()
        for place in Path("/proc").iterdir():
            try:
                words = (place / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
                where = str((place / "cwd").readlink())
            except OSError:
                continue
            ours = any(str(folder) in words or where.startswith(str(folder)) for folder in folders)
            if ours and place.name.isdigit() and not any(one in words for one in _ENDS_BY_ITSELF):
                found.append((int(place.name), words[:200]))
        return found
