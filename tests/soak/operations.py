"""Who asks: callers that choose at random among what the gate would admit, for as long as the soak goes on."""

from __future__ import annotations

import random
import threading
from collections.abc import Callable
from typing import Any, Final

import httpx

from soak.environment import SMALL, VOLUMES, Ground, Vm
from soak.report import Book

_RARELY: Final = {"delete": 0.05, "force_delete": 0.05, "soft_delete": 0.1}
"""How often an operation that ends a VM is taken when it was drawn."""
_OFTEN: Final = {
    "live_migrate": 4.0,
    "migrate": 2.0,
    "evacuate": 8.0,
    "start": 2.0,
    "reboot": 2.0,
    "unrescue": 2.0,
    # What only changes the record is always admitted.
    "set_metadata": 0.3,
    "lock": 0.3,
    "unlock": 0.6,
}
"""How many times as often as another an operation is drawn."""
_OF_IMAGES: Final = {"snapshot": 3.0, "backup": 3.0, "shelve": 2.0, "rebuild": 2.0}
"""The same for a VM that boots from its disk."""
_NEVER: Final = {"reset_state", "create", "rename"}
"""An administrator's lie about the state, what is asked for by another door, and what hides a VM from who asks by its
name."""
_ONLY_OF_IMAGES: Final = {"snapshot", "backup"}
"""What a VM that boots a kernel is refused."""
_ONLY_BETWEEN_HOSTS: Final = {"migrate", "live_migrate"}
_BEGIN_AGAIN: Final = {"rebuild", "delete", "force_delete"}
"""After these a VM of that name may have another disk."""
_COPIES_MAX: Final = 10
"""How many snapshots and backups there may be before some are deleted."""
_WAITS: Final = 0.5
"""How often a caller waits for what it asked for; the others go on while it is outstanding."""
_MEDDLES: Final = 0.3
"""How often a live migration is told to end at once, or to go on at any price."""
EARLY: Final = "guests stopped as they booted"
"""What is counted."""
_BOOTS: Final = {"start", "reboot", "unshelve", "restore"}
_ENDS_BOOT: Final = ("stop", "stop", "reboot", "resize", "shelve")
_TOO_EARLY: Final = 0.5
"""How often a guest that was started is to stop, and so on, while it boots."""
ROTATION: Final = 2


class Asking:
    """The callers. `serving` is set while there is a server to ask, `over` once it is enough."""

    def __init__(
        self, ground: Ground, book: Book, serving: threading.Event, over: threading.Event, *, early: bool
    ) -> None:
        self._ground = ground
        self._book = book
        self._serving = serving
        self._over = over
        self._early = early
        """Whether guests that still boot are to stop and so on."""
        self.disturbed: set[str] = set()
        """The VMs whose disk may rightly have another content than at first."""

    def ask_until_over(self, seed: float) -> None:
        """What one caller does."""
        chance = random.Random(seed)
        while not self._over.is_set():
            self._serving.wait()
            try:
                self._ask(chance)
            except (httpx.HTTPError, RuntimeError):
                # Killed under us: what was not acknowledged need not have happened.
                self._book.count("broken connections")
            except Exception as error:  # noqa: BLE001 - a caller that breaks must be seen
                self._book.complain(f"a caller broke: {error!r}")
                return

    def _ask(self, chance: random.Random) -> None:
        vm = self._ground.vms[chance.choice(list(self._ground.vms))]
        client = self._ground.server.client
        found = client.get(f"/v1/instances/{vm.name}/allowed")
        if found.status_code == httpx.codes.NOT_FOUND:
            self.disturbed.add(vm.name)
            made = self._ground.create(vm)
            if made and self._early and chance.random() < _TOO_EARLY:
                client.get(f"/v1/requests/{made}", params={"wait": "5s"})
                self._interrupt_boot(vm, chance)
            return
        self._note_failure(found, f"allowed of {vm.name}")
        operation = self._choose(found.json().get("operations", ()), vm, chance)
        if operation is None:
            return
        parameters = self._parameters(operation, vm, chance)
        if operation in _BEGIN_AGAIN or parameters.get("from_image"):
            self.disturbed.add(vm.name)
        answer = self._ground.server.submit(vm.name, operation, **parameters)
        self._note_failure(answer, f"{operation} of {vm.name}")
        if not answer.is_success:
            self._book.count(f"{operation}: refused")
            return
        request_id = self._book.acknowledge(answer.json().get("request"), operation)
        if operation == "live_migrate" and chance.random() < _MEDDLES:
            self._meddle(vm, chance)
        if request_id and (chance.random() < _WAITS or (operation in _BOOTS and self._early)):
            client.get(f"/v1/requests/{request_id}", params={"wait": "5s"})
        if operation in _BOOTS and self._early and chance.random() < _TOO_EARLY:
            self._interrupt_boot(vm, chance)
        if operation in {"snapshot", "backup"}:
            self._delete_copy(chance)

    def _choose(self, offered: list[dict[str, Any]], vm: Vm, chance: random.Random) -> str | None:
        often = _OFTEN | (_OF_IMAGES if vm.small else {})
        names = [str(one["operation"]) for one in offered if one["disposition"] == "admitted"]
        never = (
            _NEVER | (set() if vm.small else _ONLY_OF_IMAGES) | (set() if self._ground.agents else _ONLY_BETWEEN_HOSTS)
        )
        choices = [name for name in names if name not in never]
        if not choices:
            return None
        operation = chance.choices(choices, [often.get(name, 1) for name in choices])[0]
        return operation if chance.random() < _RARELY.get(operation, 1.0) else None

    def _meddle(self, vm: Vm, chance: random.Random) -> None:
        word = chance.choice(("live_migrate_abort", "live_migrate_force_complete"))
        answer = self._ground.server.submit(vm.name, word)
        self._note_failure(answer, f"{word} of {vm.name}")
        if answer.is_success:
            self._book.acknowledge(answer.json().get("request"), word)
        else:
            self._book.count(f"{word}: refused")

    def _interrupt_boot(self, vm: Vm, chance: random.Random) -> None:
        """Ask for something that ends a guest which has only just been started."""
        word = chance.choice(_ENDS_BOOT)
        parameters = {"hard": False} if word in {"stop", "reboot"} else self._parameters(word, vm, chance)
        answer = self._ground.server.submit(vm.name, word, **parameters)
        self._note_failure(answer, f"{word} of {vm.name} as it boots")
        if answer.is_success:
            self._book.count(EARLY)
            self._book.acknowledge(answer.json().get("request"), word)

    def _delete_copy(self, chance: random.Random) -> None:
        """Delete one of the copies that are not needed, once there are many; one that is in use is refused."""
        copies = self._copies()
        if len(copies) > _COPIES_MAX:
            answer = self._ground.server.client.delete(f"/v1/images/{chance.choice(copies)}")
            self._note_failure(answer, "deleting an image")
            self._book.count("images deleted" if answer.is_success else "images that are in use")

    def _copies(self) -> list[str]:
        found = self._ground.server.get("/v1/images")["items"]
        return [str(image["id"]) for image in found if image["source_instance"]]

    # ---------------------------------------------------------------------------------------------- parameters

    def _parameters(self, operation: str, vm: Vm, chance: random.Random) -> dict[str, Any]:
        volume = f"data-{chance.randrange(VOLUMES)}"
        label = f"{vm.name}-made-{self._book.label()}"
        least = 128 if vm.small else 64
        makers: dict[str, Callable[[], dict[str, Any]]] = {
            "stop": lambda: {"hard": chance.choice((True, False))},
            "reboot": lambda: {"hard": chance.choice((True, False))},
            "attach_volume": lambda: {"volume": volume},
            "detach_volume": lambda: {"volume": self._attached(vm, "volumes")},
            "swap_volume": lambda: {"old": self._attached(vm, "volumes"), "new": volume},
            "detach_interface": lambda: {"interface": self._attached(vm, "interfaces")},
            "resize": lambda: {"memory_mib": least + chance.choice((0, 8, 16)), "root_gib": chance.choice((1, 2))},
            "rebuild": lambda: self._source(vm, chance),
            "snapshot": lambda: {"name": label},
            "backup": lambda: {"backup_type": "daily", "rotation": ROTATION},
            "set_metadata": lambda: {"set": {"note": label}},
            "set_password": lambda: {"user": "root", "password": "a secret of the soak"},
            "migrate": lambda: {"host": self._elsewhere(vm, chance)},
            "live_migrate": lambda: {"host": self._elsewhere(vm, chance)},
            "evacuate": lambda: {"host": self._elsewhere(vm, chance), "from_image": self._ground.shared is None},
        }
        return makers.get(operation, dict)()

    def _attached(self, vm: Vm, kind: str) -> str:
        """The id of one of the volumes or interfaces of a VM."""
        found = self._ground.server.get(f"/v1/instances/{vm.name}").get(kind) or ("none",)
        return str(found[0]["id"] if isinstance(found[0], dict) else found[0])

    def _source(self, vm: Vm, chance: random.Random) -> dict[str, Any]:
        """What a VM is rebuilt from: its own image, or one of the copies of any other that boots likewise."""
        choices = [SMALL, *self._copies()] if vm.small else []
        return {"image": chance.choice(choices)} if choices and chance.random() < _WAITS else {}

    def _elsewhere(self, vm: Vm, chance: random.Random) -> str:
        host = str(self._ground.server.get(f"/v1/instances/{vm.name}")["host"])
        return chance.choice([name for name in self._ground.folders if name != host] or [host])

    def _note_failure(self, answer: httpx.Response, what: str) -> None:
        # Not ready yet (503) and full (507, 429) are honest answers; anything else in that range is a defect.
        honest = {httpx.codes.SERVICE_UNAVAILABLE, httpx.codes.INSUFFICIENT_STORAGE}
        if answer.is_server_error and answer.status_code not in honest:
            self._book.complain(f"{what}: {answer.status_code} {answer.text[:300]}")
