"""Whatever is loaded, brought back, edited and restarted: the policy in force is the one that a model of it names."""

from __future__ import annotations

import asyncio
import shutil
import tempfile
from pathlib import Path

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from in_process.trusting_verifier import TrustingProver
from interlock.core.errors import NotFound
from interlock.core.operations import Operation
from interlock.core.policy import CompiledPolicy, Policy
from interlock.core.policy_switches import PolicyBundle
from interlock.core.roles import Role
from interlock.policies.active_policy import PolicyInForce
from interlock.policies.verification import Proof
from interlock.service.auth import Caller
from interlock.service.configured_policy import ConfiguredPolicy
from interlock.service.policies import Policies
from interlock.service.policy_requests import NewPolicy, OldPolicy
from interlock.stores.schema import upgrade
from interlock.stores.sqlite import SqliteStore
from tiers import tier

ADMIN = Caller(token_id="t", name="admin", role=Role.ADMIN, project="default")
MAIN = "site.toml"
DECIDES = (0, 0, 1, 2)
TEXTS = tuple(
    f'[policy]\nname = "p{number}"\n'
    f'[[rule]]\nid = "r"\noperations = ["stop"]\nverdict = "deny"\nreason = "r{decides}"\n'
    for number, decides in enumerate(DECIDES)
)
"""Four policies, of which the first two decide the same."""
BROKEN, DOUBTED = -1, -2
"""What the file may hold besides: a text that is no policy, and one that does not hold."""
_FILES = {BROKEN: "[policy", DOUBTED: TEXTS[0].replace("r0", "doubted"), **dict(enumerate(TEXTS))}


class DoubtingProver(TrustingProver):
    """Finds something wrong with one text only."""

    async def prove(self, bundle: PolicyBundle, explore_ms: int) -> Proof:
        proof = await super().prove(bundle, explore_ms)
        doubted = bundle.files[MAIN] == _FILES[DOUBTED]
        return msgspec.structs.replace(proof, wrong="It does not hold.") if doubted else proof


class Model:
    """What should be in force, in a few lines: texts by their number, and the switches so far."""

    def __init__(self) -> None:
        self.file = 0
        self.read: int | None = 0
        """What the running server has taken of the file; None if it refused what was there when it started."""
        self.refused = False
        """Whether it refused what was there when it last looked."""
        self.switches: list[tuple[int, bool, int]] = []
        """Of each: the text, whether it was live, and the text that was configured then."""

    @property
    def now(self) -> int:
        return self.switches[-1][0]

    @property
    def configured(self) -> int:
        return self.switches[-1][2] if self.read is None else self.read

    def start(self) -> None:
        self.refused = self.file < 0
        self.read = None if self.refused else self.file
        if self.refused:
            return
        if self.switches:
            text, live, configured = self.switches[-1]
            if DECIDES[configured] == DECIDES[self.file] and (live or text == self.file):
                return
        self.switches.append((self.file, False, self.file))

    def load(self, text: int) -> None:
        if text != self.now:
            self.switches.append((text, True, self.configured))

    def roll_back(self) -> bool:
        before = [text for text, _, _ in self.switches if text != self.now]
        if before:
            self.switches.append((before[-1], True, self.configured))
        return bool(before)

    def reload(self) -> None:
        self.refused = self.file < 0
        if self.refused:
            return
        if self.file != self.read or self.now != self.file:
            self.switches.append((self.file, False, self.file))
        self.read = self.file


class Running:
    """One server's policies after the other, on one database and one file."""

    def __init__(self, folder: Path) -> None:
        self.file = folder / MAIN
        self.database = folder / "store.db"
        self.policies: Policies
        self.in_force: PolicyInForce

    async def start(self) -> None:
        self.store = SqliteStore(self.database)
        await self.store.open()
        performs = frozenset(Operation)
        self.in_force = PolicyInForce(CompiledPolicy(Policy(name="none", rules=()), performs))
        self.policies = Policies(
            self.store,
            self.in_force,
            ConfiguredPolicy(str(self.file)),
            DoubtingProver(),
            performs=performs,
            explore_ms=0,
            explore_ms_max=0,
            wake=lambda _: None,
            reachable=lambda _: True,
        )
        await self.policies.open()


deeds = st.lists(
    st.one_of(
        st.tuples(st.just("load"), st.integers(0, len(TEXTS) - 1)),
        st.tuples(st.just("edit"), st.sampled_from(sorted(_FILES))),
        st.tuples(st.sampled_from(["roll back", "reload", "restart"]), st.just(0)),
    ),
    max_size=12,
)


@pytest.fixture(scope="module")
def empty(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("empty") / "store.db"
    upgrade(path)
    return path


@settings(max_examples=tier(20, 300))
@given(deeds=deeds)
def test_the_policy_in_force_is_the_one_that_the_model_names(empty: Path, deeds: list[tuple[str, int]]) -> None:
    with tempfile.TemporaryDirectory() as folder:
        shutil.copy(empty, Path(folder) / "store.db")
        asyncio.run(_follow(Running(Path(folder)), Model(), deeds))


async def _follow(running: Running, model: Model, deeds: list[tuple[str, int]]) -> None:
    running.file.write_text(TEXTS[0])
    await running.start()
    model.start()
    for deed, text in deeds:
        match deed:
            case "load":
                await running.policies.load(ADMIN, NewPolicy(main=MAIN, files={MAIN: TEXTS[text]}))
                model.load(text)
            case "roll back":
                try:
                    await running.policies.roll_back(ADMIN, OldPolicy())
                    went = True
                except NotFound:
                    went = False
                assert model.roll_back() == went
            case "edit":
                running.file.write_text(_FILES[text])
                model.file = text
            case "reload":
                await running.policies.reload()
                model.reload()
            case _:
                await running.store.close()
                await running.start()
                model.start()
        await _agree(running, model)
    await running.store.close()


async def _agree(running: Running, model: Model) -> None:
    name = f"p{model.now}"
    assert running.in_force.compiled.policy.name == running.policies.now.name == name
    assert running.policies.bundle.files == {MAIN: TEXTS[model.now]}
    assert (running.policies.refused is not None) == model.refused
    history = await running.policies.history(100)
    assert [one.name for one in reversed(history)] == [f"p{text}" for text, _, _ in model.switches]
    assert running.policies.now == history[0]
