"""Time: ages go on as the machine runs, whatever the wall clock is set to, and people are shown what that says."""

from __future__ import annotations

from pathlib import Path
from typing import Final

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from conformance.store.harness import admitting, creating
from interlock import core
from interlock.core.operations import Operation
from interlock.core.records import Change, Instance, Submission
from interlock.core.states import VmState
from interlock.policies.language.loader import compile_named
from interlock.ports import IdempotencyKey, Jump
from interlock.stores import ClockState
from interlock.stores.clock import GRACE_MS, JUMP_MS, KeptTime, Offsets, StoreClock, SystemClock
from interlock.stores.history import History
from interlock.stores.idempotency_keys import KEY_KEPT_MS
from interlock.stores.sqlite import SqliteStore
from tiers import tier

NOON_MS: Final = 1_790_000_000_000
MINUTE_MS: Final = 60_000
HOUR_MS: Final = 60 * MINUTE_MS
DAY_MS: Final = 24 * HOUR_MS


class Machine:
    """A machine's clocks, and what really is. Satisfies `ports.Clock`."""

    def __init__(self) -> None:
        self.true_ms = NOON_MS
        self.wrong_by_ms = 0
        self.up_ms = 5 * HOUR_MS
        self.boots = 1

    def wall_ms(self) -> int:
        return self.true_ms + self.wrong_by_ms

    def running_ms(self) -> int:
        return self.up_ms

    def boot(self) -> str:
        return f"boot {self.boots}"

    def run(self, for_ms: int) -> None:
        """Time passes, asleep or not."""
        self.true_ms += for_ms
        self.up_ms += for_ms

    def reboot(self, off_ms: int = 0, up_ms: int = 1) -> None:
        """The machine is off for a while, then up for another before anything of ours is started."""
        self.true_ms += off_ms + up_ms
        self.up_ms = up_ms
        self.boots += 1


@pytest.fixture
def machine() -> Machine:
    return Machine()


class Served:
    """A store that is opened again and again."""

    def __init__(self, path: Path, machine: Machine) -> None:
        self._path = path
        self._machine = machine

    async def start(self) -> SqliteStore:
        self.store = SqliteStore(self._path, self._machine)
        await self.store.open()
        return self.store

    async def restart(self) -> SqliteStore:
        await self.store.close()
        return await self.start()

    def shown_now_ms(self) -> int:
        return self.store.shown_ms(self.store.now_ms())


@pytest.fixture
async def served(tmp_path: Path, machine: Machine) -> Served:
    one = Served(tmp_path / "store.db", machine)
    await one.start()
    return one


async def test_nothing_follows_a_wall_clock_that_is_set_but_what_people_are_shown(
    served: Served, machine: Machine
) -> None:
    store = served.store
    made = store.now_ms()
    machine.run(MINUTE_MS)
    for wrong_by_ms in (9 * DAY_MS, -9 * DAY_MS, 0):
        machine.wrong_by_ms = wrong_by_ms
        before = store.now_ms()
        jump = await store.time.look()
        assert store.now_ms() == before == made + MINUTE_MS
        assert jump is not None
        assert (jump.by_ms > 0) is (wrong_by_ms >= 0)
        assert served.shown_now_ms() == machine.wall_ms()
        assert await store.time.look() is None
    assert store.shown_ms(made) == NOON_MS
    await store.close()


@pytest.mark.parametrize("wrong_by_ms", [9 * DAY_MS, -9 * DAY_MS])
async def test_a_server_started_with_a_wrong_clock_hastens_nothing_and_is_right_again_at_once(
    served: Served, machine: Machine, wrong_by_ms: int
) -> None:
    made = served.store.now_ms()
    machine.run(MINUTE_MS)
    await served.store.close()
    machine.wrong_by_ms = wrong_by_ms
    machine.run(MINUTE_MS)
    store = await served.start()
    meant = store.time.jump_at_opening
    assert meant is not None
    assert abs(meant.by_ms - wrong_by_ms) <= MINUTE_MS
    assert made + MINUTE_MS <= store.now_ms() <= made + 2 * MINUTE_MS
    wrongly = store.now_ms()
    assert store.shown_ms(wrongly) == machine.wall_ms()
    machine.run(MINUTE_MS)
    machine.wrong_by_ms = 0
    assert await store.time.look() is not None
    assert store.shown_ms(wrongly) == machine.wall_ms() - MINUTE_MS
    assert abs(store.shown_ms(made) - NOON_MS) <= MINUTE_MS
    store = await served.restart()
    assert store.time.jump_at_opening is None
    assert store.shown_ms(wrongly) == machine.wall_ms() - MINUTE_MS
    await store.close()


async def test_a_server_that_was_down_has_aged_by_what_the_machine_ran(served: Served, machine: Machine) -> None:
    made = served.store.now_ms()
    await served.store.close()
    machine.run(3 * DAY_MS)
    store = await served.start()
    assert store.now_ms() == made + 3 * DAY_MS
    assert store.time.jump_at_opening is None
    assert store.time.cautious_until_ms == 0
    await store.close()


async def test_time_for_which_the_machine_was_off_is_no_age_and_keeps_older_times_right(
    served: Served, machine: Machine
) -> None:
    """It cannot be told from a clock that is wrong."""
    made = served.store.now_ms()
    await served.store.close()
    machine.reboot(off_ms=3 * DAY_MS, up_ms=2 * MINUTE_MS)
    store = await served.start()
    assert store.now_ms() == made + 2 * MINUTE_MS
    assert store.time.jump_at_opening == Jump(at_ms=store.now_ms(), by_ms=3 * DAY_MS, between_boots=True)
    assert store.shown_ms(made) == NOON_MS
    assert served.shown_now_ms() == machine.wall_ms()
    assert store.time.cautious_until_ms == store.now_ms() + GRACE_MS
    machine.run(MINUTE_MS)
    store = await served.restart()
    assert store.time.jump_at_opening is None
    assert (store.shown_ms(made), served.shown_now_ms()) == (NOON_MS, machine.wall_ms())
    await store.close()


async def test_a_clock_that_is_behind_after_a_boot_costs_no_age_and_is_corrected(
    served: Served, machine: Machine
) -> None:
    """As where the battery of its clock is empty."""
    made = served.store.now_ms()
    await served.store.close()
    machine.reboot(off_ms=MINUTE_MS, up_ms=MINUTE_MS)
    machine.wrong_by_ms = -machine.true_ms
    store = await served.start()
    assert store.now_ms() == made
    machine.wrong_by_ms = 0
    assert await store.time.look() is not None
    assert served.shown_now_ms() == machine.wall_ms()
    await store.close()


async def test_a_quick_boot_is_no_jump(served: Served, machine: Machine) -> None:
    await served.store.close()
    machine.reboot(off_ms=JUMP_MS - 1)
    store = await served.start()
    assert store.time.jump_at_opening is None
    assert (served.shown_now_ms(), store.time.cautious_until_ms) == (machine.wall_ms(), 0)
    await store.close()


async def test_a_clock_that_is_slewed_is_followed_and_not_told_of(served: Served, machine: Machine) -> None:
    store = served.store
    for _ in range(200):
        machine.run(HOUR_MS)
        machine.wrong_by_ms += 1_800  # 500 ppm
        assert await store.time.look() is None
        assert abs(served.shown_now_ms() - machine.wall_ms()) < 1_000
    assert store.time.last_jump is None
    await store.close()


@pytest.mark.parametrize(("by_ms", "told"), [(JUMP_MS - 1, False), (JUMP_MS, True), (-JUMP_MS, True), (999, False)])
async def test_a_jump_is_told_from_its_length_on(served: Served, machine: Machine, by_ms: int, *, told: bool) -> None:
    machine.wrong_by_ms = by_ms
    assert (await served.store.time.look() is not None) is told
    assert (served.shown_now_ms() == machine.wall_ms()) is (abs(by_ms) >= 1_000)
    await served.store.close()


async def test_caution_lasts_while_a_server_runs(served: Served, machine: Machine) -> None:
    machine.wrong_by_ms = DAY_MS
    await served.store.time.look()
    assert served.store.time.cautious_until_ms == served.store.now_ms() + GRACE_MS
    machine.run(MINUTE_MS)
    await served.store.close()
    machine.run(HOUR_MS)
    store = await served.start()
    assert store.time.cautious_until_ms - store.now_ms() == GRACE_MS - MINUTE_MS
    machine.run(GRACE_MS)
    store = await served.restart()
    assert store.time.cautious_until_ms <= store.now_ms()
    machine.wrong_by_ms = 0
    await store.time.look()
    assert store.time.cautious_until_ms <= store.now_ms(), "a jump backward hastens nothing"
    await store.close()


async def test_a_store_that_keeps_nothing_else_keeps_how_far_time_has_come(served: Served, machine: Machine) -> None:
    """So that a loss of power costs minutes of an age, and not days."""
    made = served.store.now_ms()
    for _ in range(24):
        machine.run(HOUR_MS)
        await served.store.time.look()
    kept = served.store._database.read.kept_time()
    assert kept.seen_ms == made + DAY_MS
    await served.store.close()


async def test_no_key_is_forgotten_while_the_clock_is_not_trusted(served: Served, machine: Machine) -> None:
    store = served.store
    await store.create(creating("a"))
    key = IdempotencyKey(scope="t", key="k", fingerprint="f")
    await store.change("a", admitting("r1"), key)
    machine.run(KEY_KEPT_MS + HOUR_MS)
    machine.wrong_by_ms = DAY_MS
    await store.time.look()

    async def kept() -> int:
        await store.change("a", admitting(f"r{store.now_ms()}"), IdempotencyKey(scope="t", key="l", fingerprint="f"))
        await store.writable()
        return int(store._database.read._all("SELECT count(*) FROM idempotency_keys WHERE key = 'k'")[0][0])

    assert await kept() == 1
    machine.run(GRACE_MS + KEY_KEPT_MS)
    assert await kept() == 0
    await store.close()


async def test_what_was_recorded_is_found_by_the_clock_of_people(served: Served, machine: Machine) -> None:
    store = served.store

    async def deny() -> None:
        def decide(instance: Instance, now_ms: int) -> Change[None]:
            change = admitting(f"r{now_ms}")(instance, now_ms)
            return Change(instance=change.instance, requests=change.requests, events=change.events, answer=None)

        await store.change("a", decide)

    await store.create(creating("a"))
    await deny()
    await store.close()
    machine.reboot(off_ms=3 * DAY_MS)
    store = await served.start()
    await deny()
    await store.close()
    with History(served._path) as history:
        assert (history.first_at_ms, history.last_at_ms) == (NOON_MS, NOON_MS + 3 * DAY_MS + 1)
        assert len(list(history.submissions())) == 2
        assert [row[4] for row in history.submissions(since_ms=NOON_MS + DAY_MS)] == [NOON_MS + 3 * DAY_MS + 1]
        assert [row[4] for row in history.submissions(until_ms=NOON_MS + DAY_MS)] == [NOON_MS]


def test_the_machine_s_own_clocks_go_forward() -> None:
    clock = SystemClock()
    assert clock.boot()
    assert clock.running_ms() <= clock.running_ms()
    assert clock.wall_ms() > NOON_MS - 365 * DAY_MS


# ------------------------------------------------------------------------------------------- for users of the library


@pytest.mark.parametrize("by_ms", [11 * MINUTE_MS, -11 * MINUTE_MS])
def test_a_backup_that_reports_progress_is_not_taken_over_because_the_wall_clock_is_set(
    machine: Machine, by_ms: int
) -> None:
    standard = compile_named("standard")
    clock = StoreClock.resumed(None, machine)
    vm = Instance(
        id="a", name="a", project="p", host="h", vm_state=VmState.ACTIVE, launched_at_ms=clock.now_ms(),
        updated_at_ms=clock.now_ms(),
    )  # fmt: skip
    asked = Submission(request_id="b1", operation=Operation.BACKUP, requested_by="ann")
    vm = core.take(core.admit(vm, asked, standard, clock.now_ms()).instance, None, clock.now_ms()).instance
    for _ in range(12):
        machine.run(5_000)
        vm = core.progress(vm, "b1", vm.fence, clock.now_ms()).instance
    stop = Submission(request_id="s1", operation=Operation.STOP, requested_by="ann")
    before = core.judge(vm, stop, standard, clock.now_ms())
    machine.wrong_by_ms += by_ms
    machine.run(1_000)
    after = core.judge(vm, stop, standard, clock.now_ms())
    assert isinstance(before, core.Admitted)
    assert isinstance(after, core.Admitted)
    assert (before.rule, before.supersedes) == (after.rule, after.supersedes) == (before.rule, ())
    # The wall clock itself, which the shell could have passed, takes the backup over.
    if by_ms > 0:
        jumped = core.judge(vm, stop, standard, machine.wall_ms())
        assert isinstance(jumped, core.Admitted)
        assert jumped.supersedes == ("b1",)


def test_the_time_of_a_program_with_its_own_database_goes_on_in_the_next_process(machine: Machine) -> None:
    clock = StoreClock.resumed(None, machine)
    assert clock.shown_ms(clock.now_ms()) == machine.wall_ms()
    machine.run(HOUR_MS)
    written = msgspec.json.encode(clock.state)
    machine.run(MINUTE_MS)
    machine.reboot(off_ms=DAY_MS, up_ms=5_000)
    state = msgspec.json.decode(written, type=ClockState)
    again = StoreClock.resumed(state, machine)
    assert again.now_ms() == state.time.seen_ms + 5_000
    assert again.shown_ms(again.now_ms()) == machine.wall_ms()


# ----------------------------------------------------------------------------------- whatever the clocks are made to do

LENGTHS = st.integers(0, 20 * DAY_MS)
STEPS = st.one_of(
    st.tuples(st.just("run"), LENGTHS),
    st.tuples(st.just("set"), st.integers(-20 * DAY_MS, 20 * DAY_MS)),
    st.tuples(st.just("restart"), LENGTHS),
    st.tuples(st.just("reboot"), LENGTHS),
    st.tuples(st.just("crash"), LENGTHS),
)


def opened(machine: Machine, kept: KeptTime, offsets: Offsets) -> StoreClock:
    return StoreClock(machine, kept, offsets, jump_ms=JUMP_MS, grace_ms=GRACE_MS)


@settings(max_examples=tier(60, 1500))
@given(st.lists(STEPS, max_size=12))
def test_no_age_grows_faster_than_time_passes_and_time_never_goes_back(steps: list[tuple[str, int]]) -> None:
    machine = Machine()
    clock = opened(machine, KeptTime(), Offsets())
    for what, length_ms in steps:
        before, truly = clock.now_ms(), machine.true_ms
        match what:
            case "run":
                machine.run(length_ms)
            case "set":
                machine.wrong_by_ms = length_ms
            case "restart":
                kept, offsets = clock.kept, clock.offsets
                seen = clock.now_ms()
                machine.run(length_ms)
                clock = opened(machine, _seen(kept, seen), offsets)
            case "reboot":
                kept, offsets, seen = clock.kept, clock.offsets, clock.now_ms()
                machine.reboot(off_ms=length_ms, up_ms=MINUTE_MS)
                clock = opened(machine, _seen(kept, seen), offsets)
            case _:
                # What came after the last write is lost.
                kept, offsets = clock.kept, clock.offsets
                machine.reboot(off_ms=length_ms)
                clock = opened(machine, kept, offsets)
                assert clock.now_ms() >= kept.seen_ms
                before = min(before, clock.now_ms())
        jump = clock.look()
        assert clock.now_ms() >= before
        assert clock.now_ms() - before <= machine.true_ms - truly
        shown = clock.offsets.shown_ms(clock.now_ms())
        assert abs(shown - machine.wall_ms()) < 1_000
        if jump is not None and jump.by_ms > 0:
            assert clock.kept.cautious_until_ms >= clock.now_ms() + GRACE_MS
        _check_inverse(clock.offsets, clock.now_ms())


def _seen(kept: KeptTime, seen_ms: int) -> KeptTime:
    return KeptTime(
        seen_ms=seen_ms,
        boot=kept.boot,
        booted_ms=kept.booted_ms,
        cautious_until_ms=kept.cautious_until_ms,
        jump=kept.jump,
    )


def _check_inverse(offsets: Offsets, now_ms: int) -> None:
    """What people are shown is found again, or what comes first of those that are shown as later."""
    for at_ms in (now_ms, now_ms - DAY_MS, offsets.kept[-1][0]):
        found = offsets.stored_ms(offsets.shown_ms(at_ms))
        assert offsets.shown_ms(found) >= offsets.shown_ms(at_ms)
        assert found <= at_ms
