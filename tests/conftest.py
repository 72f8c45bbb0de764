"""What all tests share: how many examples a property gets, their order, and a process that obeys Ctrl-C."""

from __future__ import annotations

import asyncio
import gc
import os
import signal
from collections.abc import Callable, Generator
from pathlib import Path
from typing import Any, Final

import pytest
from hypothesis import HealthCheck, settings
from xdist.scheduler import LoadScopeScheduling

from in_process.virtual_time import VirtualTimeLoop
from interlock.stores.writer import Writer
from leftover_rules import remove_leftover_rules
from tiers import tier

# Without it, each of the hundreds of processes that tests start compiles all of Interlock anew.
os.environ.pop("PYTHONDONTWRITEBYTECODE", None)
# Processes that tests start run code of the tests too.
os.environ["PYTHONPATH"] = str(Path(__file__).parent)

# Neither how long an example takes nor how long it takes to be drawn says anything on a busy machine; a test that hangs
# is ended by its time-out.
settings.register_profile(
    "interlock", deadline=None, suppress_health_check=[HealthCheck.too_slow], max_examples=tier(100, 1000)
)
settings.load_profile("interlock")


_WITH_VMS: Final[set[Path]] = set()
"""The modules that boot VMs."""

SHARING = {
    *("test_house_rules.py", "test_laws_under_load.py", "test_linux_travels.py", "test_operations_on_guests.py"),
    *("test_qemu_console.py", "test_small_disk.py", "test_small_guest.py"),
}
"""Files whose tests share a fixture that takes long: one worker runs all of them."""


class WholeFiles(LoadScopeScheduling):  # type: ignore[misc]  # it has no types
    """Gives tests to workers one by one, and those of a file that shares a fixture together.

    The marks of xdist for that have no effect: pytest 9 does not let it rename tests.
    """

    def _split_scope(self, nodeid: str) -> str:
        path = nodeid.partition("::")[0]
        return path if path.rpartition("/")[2] in SHARING else nodeid


def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> LoadScopeScheduling:
    return WholeFiles(config, log)


@pytest.hookimpl(wrapper=True)
def pytest_collection() -> Generator[None, object, object]:
    """Keep the garbage collector from the tests themselves, which live until the end: a fifth of the time of collecting
    them, and a quarter of a second whenever it looks at everything."""
    gc.disable()
    try:
        return (yield)
    finally:
        gc.collect()
        gc.freeze()
        gc.enable()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Begin with what boots VMs: it takes longest and mostly waits, and what is short fills the workers at the end."""
    items.sort(key=lambda item: item.get_closest_marker("qemu") is None)
    _WITH_VMS.update(item.path for item in items if item.get_closest_marker("qemu"))


def pytest_asyncio_loop_factories(item: pytest.Item) -> dict[str, Callable[[], asyncio.AbstractEventLoop]]:
    """Tests that are marked `virtual_time`, and their fixtures, run in a loop whose time jumps over every wait."""
    virtual = item.get_closest_marker("virtual_time") is not None
    return {"virtual": VirtualTimeLoop} if virtual else {"real": asyncio.new_event_loop}


@pytest.fixture(scope="module", autouse=True)
def _rules_are_removed(request: pytest.FixtureRequest) -> Generator[None]:
    """Remove the rules of networks that a module with real VMs has left."""
    yield
    if request.node.path in _WITH_VMS:
        remove_leftover_rules()


@pytest.fixture(autouse=True)
def _virtual_time_waits_for_the_writer(monkeypatch: pytest.MonkeyPatch) -> None:
    """A store's thread lives in real time: virtual time stands still until what it was given is written."""
    submit = Writer.submit

    def submitted(self: Writer, job: Any, done: Callable[..., None], *more: Any, **named: Any) -> None:
        loop = asyncio.get_running_loop()
        if not isinstance(loop, VirtualTimeLoop):
            submit(self, job, done, *more, **named)
            return
        loop.thread_begins()

        def ended(*answer: Any) -> None:
            loop.thread_ends()
            done(*answer)

        submit(self, job, ended, *more, **named)

    monkeypatch.setattr(Writer, "submit", submitted)


@pytest.fixture(autouse=True, scope="session")
def _interrupts_are_heard() -> None:
    """A shell ignores SIGINT for what it runs in the background, and children inherit that."""
    if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)
