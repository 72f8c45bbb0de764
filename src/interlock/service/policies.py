"""The policy in force: proved before it is put there, switched at once, kept with its history, and brought back.

What a policy says is not known here, nor how it is proved (see `proving`).
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Iterable
from contextlib import asynccontextmanager
from typing import Final

import msgspec
import structlog

from interlock.core import lifecycle
from interlock.core.errors import InUse, Invalid, NotFound, PolicyError, PolicyMismatch, StoreError
from interlock.core.operations import Operation
from interlock.core.policy import CompiledPolicy, Policy
from interlock.core.policy_switches import Outstanding, PolicyBundle, PolicySwitch, SwitchSource
from interlock.core.records import Change, Instance
from interlock.policies import sources
from interlock.policies.in_force import PolicyInForce
from interlock.policies.proving import Proof
from interlock.policies.sources import Source
from interlock.ports import Role, Store
from interlock.service import promises
from interlock.service.callers import Caller
from interlock.service.configured_policy import ConfiguredPolicy, RefusedPolicy, against
from interlock.service.policy_wishes import NewPolicy, OldPolicy, Terms, bundle_of
from interlock.service.proving import Prover

_LOG = structlog.get_logger(__name__)
_SERVER: Final = "server"
"""Who put a policy in force where nobody asked for it."""
_DIGEST_LEAST: Final = 16
"""How much of a digest must be named, in hexadecimal digits; decisions are told with so much."""
_AT_ONCE: Final = 500
"""How many instances are judged again in one go."""
_HISTORY_PAGE: Final = 100


class Loaded(msgspec.Struct, frozen=True, kw_only=True):
    """What became of a policy that was to be put in force."""

    proof: Proof
    before: PolicySwitch
    after: PolicySwitch
    """The same as before if it was refused, if nothing was to be changed, or if it was in force already."""


class Policies:
    """The policy in force, and the verbs on it."""

    def __init__(
        self,
        store: Store,
        in_force: PolicyInForce,
        configured: ConfiguredPolicy,
        prover: Prover,
        *,
        performs: Iterable[Operation],
        explore_ms: int,
        explore_ms_max: int,
        wake: Callable[[str], None],
    ) -> None:
        """`configured` is what the configuration names; `wake` has an instance looked at."""
        self._store = store
        self._in_force = in_force
        self._configured = configured
        self._prover = prover
        self._performs = tuple(performs)
        self._explore_ms = explore_ms
        self._explore_ms_max = explore_ms_max
        self._wake = wake
        self._loading = asyncio.Lock()
        self._listeners: list[Callable[[PolicySwitch], None]] = []
        self.bundle: PolicyBundle
        """The text of the policy in force."""
        self.now: PolicySwitch
        """The switch that put it in force."""

    # ------------------------------------------------------------------------------------------------- at the start

    async def open(self) -> None:
        """Find which policy is in force: the configured one, one that was loaded live since it was configured, or the
        last one where the configured one cannot be read or does not hold.

        Raises:
            PolicyError: the configured one is refused, and there is no other.
            StoreError: that could not be kept.
        """
        last = next(iter(await self._store.policy_switches(1)), None)
        source, wrong = self._configured.source, self._configured.wrong
        if source is None:
            assert wrong is not None
            await self._stay(last, wrong.message, wrong.remedy)
            return
        if last is None or last.configured_digest != source.policy.digest:
            proof = await self._speaks_against(source, last)
            if proof is not None:
                self._configured.source = None
                await self._stay(last, against(proof), proof.remedy)
                return
            why = "it is new here" if last is None else f"it has changed since {last.name} came into force"
            await self._begin(source, last, why)
            return
        bundle = await self._store.policy_bundle(last.number) or source.bundle
        live = last.source in {SwitchSource.LOADED, SwitchSource.ROLLED_BACK}
        if not live and bundle != source.bundle:
            await self._begin(source, last, "its text has changed")
            return
        try:
            policy = await asyncio.to_thread(sources.read, bundle) if live else source.policy
        except PolicyError as error:
            why = f"{last.name}, which was loaded live, cannot be read any more: {error.message}"
            await self._begin(source, last, why)
            return
        what = "loaded live, stays in force" if live else "configured, is in force"
        _LOG.info(f"the policy that was {what}", policy=policy.name, digest=policy.digest, since_switch=last.number)
        await self._go_on(last, policy, bundle)

    async def _speaks_against(self, source: Source, last: PolicySwitch | None) -> Proof | None:
        """Prove the configured policy, which is new here; its proof if that does not hold."""
        if self._configured.is_builtin:
            return None
        proof = await self._prover.prove(source.bundle, self._explore_for_ms(None))
        if last is None and proof.policy is None:
            # It could be read, and there is no other to fall back to.
            _LOG.warning("the configured policy was not checked", policy=source.policy.name, why=proof.wrong)
            return None
        return None if proof.holds else proof

    async def _stay(self, last: PolicySwitch | None, why: str, remedy: str | None) -> None:
        """Go on by what was in force last, since the configured policy is refused. Raises `PolicyError`."""
        bundle = None if last is None else await self._store.policy_bundle(last.number)
        if last is None or bundle is None:
            raise PolicyError(why, remedy=remedy)
        try:
            policy = await asyncio.to_thread(sources.read, bundle)
        except PolicyError as error:
            also = f"{last.name}, which was in force last, cannot be read any more either: {error.message}"
            raise PolicyError(f"{why} {also}", remedy=remedy) from None
        refused = self._configured.refuse(why, remedy, self._store.now_ms())
        _LOG.error(
            "the configured policy is refused, and the last one stays in force",
            configured=refused.name,
            why=why,
            remedy=remedy,
            stays=policy.name,
            digest=policy.digest,
            since_switch=last.number,
        )
        await self._go_on(last, policy, bundle)

    async def _go_on(self, last: PolicySwitch, policy: Policy, bundle: PolicyBundle) -> None:
        """Put in force what was in force when the last server ended."""
        self.bundle = bundle
        self.now = last if policy.digest == last.digest else await self._with_its_meaning(last, policy)
        await self._bind(policy)
        if last.outstanding is Outstanding.REJUDGE and last.cancelled is None:
            await self._judge_again()

    async def _begin(self, source: Source, last: PolicySwitch | None, why: str) -> None:
        """Put the configured policy in force, whatever was before."""
        policy, self.bundle = source.policy, source.bundle
        switch = self._switch(policy, policy.digest, SwitchSource.CONFIGURED, _SERVER)
        self.now = msgspec.structs.replace(switch, number=await self._store.switch_policy(switch, self.bundle))
        await self._bind(policy)
        _LOG.info("the configured policy comes into force", policy=policy.name, digest=policy.digest, why=why)
        if last is not None:
            await self._judge_again()

    async def _with_its_meaning(self, last: PolicySwitch, policy: Policy) -> PolicySwitch:
        """Keep that a text means something else to this version, so that every digest that decisions tell is known."""
        _LOG.warning("the policy in force does not mean what it did when it was loaded", policy=last.name)
        now_ms = self._store.now_ms()
        switch = msgspec.structs.replace(last, digest=policy.digest, name=policy.name, at_ms=now_ms, by=_SERVER)
        return msgspec.structs.replace(switch, number=await self._store.switch_policy(switch, self.bundle))

    async def _bind(self, policy: Policy) -> None:
        earlier = await promises.found(self._store, self._performs)
        self._in_force.replace(CompiledPolicy(policy, self._performs), earlier)

    # ---------------------------------------------------------------------------------------------------- switching

    async def load(self, caller: Caller, wish: NewPolicy, if_digest: str | None = None) -> Loaded:
        """Prove a policy and put it in force; what speaks against it comes back as a value.

        Raises:
            Forbidden, Invalid (not what a policy is named or sent by), InUse (another is being loaded), PolicyMismatch,
            StoreError (it could not be kept, and is not in force).
        """
        caller.require(Role.ADMIN, "load a policy")
        bundle = await asyncio.to_thread(bundle_of, wish)
        async with self._alone(if_digest):
            return await self._load(bundle, wish, SwitchSource.LOADED, caller.name)

    async def roll_back(self, caller: Caller, wish: OldPolicy, if_digest: str | None = None) -> Loaded:
        """Prove the policy before the present one, or the one named, and put it in force.

        Raises:
            As `load`; NotFound if there is none.
        """
        caller.require(Role.ADMIN, "load a policy")
        async with self._alone(if_digest):
            bundle = await self._former(wish.to)
            return await self._load(bundle, wish, SwitchSource.ROLLED_BACK, caller.name)

    async def reload(self) -> None:
        """Read again what the configuration names and put it in force; the log says what became of it."""
        async with self._loading:
            try:
                source = await asyncio.to_thread(Source.read, self._configured.name)
                if source == self._configured.source and source.bundle == self.bundle:
                    self._configured.take(source)
                    _LOG.info("the policy was read again, and is the one in force", policy=self.now.name)
                    return
                loaded = await self._load(source.bundle, Terms(), SwitchSource.RELOADED, _SERVER, source)
            except PolicyError as error:
                self._not_reloaded(error.message, error.remedy)
            except StoreError as error:
                _LOG.error("the policy was not reloaded", why=error.message, remedy=error.remedy, stays=self.now.name)
            else:
                if not loaded.proof.holds:
                    self._not_reloaded(against(loaded.proof), loaded.proof.remedy)

    def _not_reloaded(self, why: str, remedy: str | None) -> None:
        self._configured.refuse(why, remedy, self._store.now_ms())
        _LOG.error("the policy was not reloaded", why=why, remedy=remedy, stays=self.now.name)

    @property
    def refused(self) -> RefusedPolicy | None:
        """Why what the configuration names is not taken as it is now; None if nothing is known to be wrong with it."""
        return self._configured.refused

    @asynccontextmanager
    async def _alone(self, if_digest: str | None) -> AsyncIterator[None]:
        """Let one at a time switch. Raises `InUse`, `PolicyMismatch`."""
        if self._loading.locked():
            raise InUse("Another policy is being loaded.", remedy="Ask again when that is done.")
        async with self._loading:
            digest = self.now.digest
            if if_digest is not None and not (len(if_digest) >= _DIGEST_LEAST and digest.startswith(if_digest)):
                raise PolicyMismatch(
                    f"The policy in force is {self.now.name} with the digest {digest}, not {if_digest[:64]}.",
                    remedy="Look at the one in force, and decide anew.",
                )
            yield

    async def _load(
        self, bundle: PolicyBundle, terms: Terms, source: SwitchSource, by: str, configured: Source | None = None
    ) -> Loaded:
        proof = await self._prover.prove(bundle, self._explore_for_ms(terms.explore_seconds))
        before = self.now
        same = bundle == self.bundle and terms.outstanding is Outstanding.KEEP and configured is None
        if proof.policy is None or not proof.holds or terms.dry_run or same:
            return Loaded(proof=proof, before=before, after=before)
        taken = configured or self._configured.source
        digest = before.configured_digest if taken is None else taken.policy.digest
        switch = self._switch(proof.policy, digest, source, by, terms.outstanding)
        compiled = CompiledPolicy(proof.policy, self._performs)
        number = await self._store.switch_policy(switch, bundle)
        # From here to the end of `replace` nothing waits, so that no decision is made in between.
        self.now, self.bundle = msgspec.structs.replace(switch, number=number), bundle
        if configured is not None:
            self._configured.take(configured)
        keeps = terms.outstanding is Outstanding.KEEP
        earlier = promises.with_latest(self._in_force, self._store.now_ms()) if keeps else ()
        self._in_force.replace(compiled, earlier)
        self._tell(before)
        await self._judge_again()
        return Loaded(proof=proof, before=before, after=self.now)

    def _switch(
        self,
        policy: Policy,
        configured_digest: str,
        source: SwitchSource,
        by: str,
        outstanding: Outstanding = Outstanding.KEEP,
    ) -> PolicySwitch:
        return PolicySwitch(
            digest=policy.digest,
            name=policy.name,
            at_ms=self._store.now_ms(),
            by=by,
            source=source,
            configured_digest=configured_digest,
            outstanding=outstanding,
        )

    def _explore_for_ms(self, seconds: float | None) -> int:
        if seconds is None:
            return min(self._explore_ms, self._explore_ms_max)
        # Not a number is neither more nor less than anything.
        if not 0 <= seconds * 1000 <= self._explore_ms_max:
            most = f"{self._explore_ms_max / 1000:g}"
            raise Invalid(f"explore_seconds: {seconds:g}; this server allows 0 to {most}.")
        return round(seconds * 1000)

    # ------------------------------------------------------------------------------------------ after a switch

    async def _judge_again(self) -> None:
        """Have what is held asked for anew and, if this switch is to judge what waits, have that judged.

        A store that fails in the middle undoes nothing: the policy is in force, and the next start goes on with it.
        """
        number, rejudges = self.now.number, self.now.outstanding is Outstanding.REJUDGE
        try:
            # What was decided just before the switch may still be on its way to where `unsettled` looks.
            await self._store.settled()
            unsettled = await self._store.unsettled()
            concerned = [one for one in unsettled if one.held or rejudges]
            cancelled = 0
            for begin in range(0, len(concerned), _AT_ONCE):
                batch = concerned[begin : begin + _AT_ONCE]
                cancelled += sum(await asyncio.gather(*(self._judge_one(one.id) for one in batch)))
            if rejudges:
                await self._store.settle_switch(number, cancelled)
                self.now = msgspec.structs.replace(self.now, cancelled=cancelled)
                _LOG.info("what was outstanding was judged again", switch=number, cancelled=cancelled)
        except StoreError as error:
            _LOG.error("what is outstanding was not all judged again", switch=number, why=error.message)
            return
        self._in_force.replace(self._in_force.compiled, promises.still_binding(self._in_force, unsettled))

    async def _judge_one(self, instance_id: str) -> int:
        def decide(instance: Instance, now_ms: int) -> Change[tuple[str, ...]]:
            return lifecycle.rejudge(instance, self._in_force.for_waiting(instance), now_ms)

        cancelled = await self._store.change(instance_id, decide)
        self._wake(instance_id)
        return len(cancelled)

    def _tell(self, before: PolicySwitch) -> None:
        now = self.now
        _LOG.info(
            "another policy is in force",
            policy=now.name,
            digest=now.digest,
            before=before.name,
            before_digest=before.digest,
            by=now.by,
            source=now.source.value,
            outstanding=now.outstanding.value,
        )
        for listener in self._listeners:
            listener(now)

    def listen(self, listener: Callable[[PolicySwitch], None]) -> None:
        """Call `listener` with the switch that put the present policy in force, now and after each one."""
        self._listeners.append(listener)
        listener(self.now)

    # ------------------------------------------------------------------------------------------------------ history

    async def history(self, limit: int, before: int | None = None) -> tuple[PolicySwitch, ...]:
        """The switches of the policy, newest first, those with a smaller number than `before`."""
        return await self._store.policy_switches(limit, before)

    async def text(self, number: int) -> PolicyBundle:
        """The text of the policy that a switch put in force. Raises `NotFound`."""
        bundle = await self._store.policy_bundle(number)
        if bundle is None:
            raise NotFound(f"There is no switch of the policy with the number {number}.")
        return bundle

    async def _former(self, number: int | None) -> PolicyBundle:
        if number is not None:
            return await self.text(number)
        before: int | None = self.now.number
        while switches := await self._store.policy_switches(_HISTORY_PAGE, before):
            for switch in switches:
                bundle = await self.text(switch.number)
                if bundle != self.bundle:
                    return bundle
                before = switch.number
        raise NotFound("No other policy was in force before this one.", remedy="Load one by name or file.")
