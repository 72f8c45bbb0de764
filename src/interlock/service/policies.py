"""The active policy: verify and load a policy, roll back, reload, and its history of switches.

`policy_verifier` verifies policies.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Iterable
from contextlib import asynccontextmanager
from datetime import UTC, datetime
from typing import Final

import msgspec
import structlog

from interlock.core import lifecycle
from interlock.core.errors import InUse, Invalid, NotFound, PolicyError, PolicyMismatch, StoreError
from interlock.core.operations import Operation
from interlock.core.policy import CompiledPolicy, Policy
from interlock.core.policy_switches import Outstanding, PolicyBundle, PolicySwitch, SwitchSource
from interlock.core.records import Change, Instance
from interlock.core.roles import Role
from interlock.policies import certificates
from interlock.policies.active_policy import PolicyInForce
from interlock.policies.certificates import SignedCertificate
from interlock.policies.language import bundle as bundles
from interlock.policies.language.bundle import Source
from interlock.policies.verification import Proof
from interlock.ports import Store
from interlock.service import earlier_policies
from interlock.service.auth import Caller
from interlock.service.configured_policy import ConfiguredPolicy, RefusedPolicy, against
from interlock.service.outstanding_check import PAUSED_MS_MAX, OutstandingCheck
from interlock.service.policy_requests import NewPolicy, OldPolicy, Terms, bundle_of
from interlock.service.policy_verifier import PolicyVerifier

_LOG = structlog.get_logger(__name__)
_SERVER: Final = "server"
"""Requester name of server-initiated switches."""
_DIGEST_LENGTH_MIN: Final = 16
"""Minimum length of a shortened digest, in hexadecimal digits; decisions show as many."""
_BATCH: Final = 500
"""Number of instances evaluated again at once."""
_HISTORY_PAGE: Final = 100


class Loaded(msgspec.Struct, frozen=True, kw_only=True):
    """The result of loading a policy."""

    proof: Proof
    before: PolicySwitch
    after: PolicySwitch
    """Equal to `before` if it was rejected, is active already, or for a dry run."""


class Policies:
    """Loads policies and keeps track of the active one."""

    def __init__(
        self,
        store: Store,
        in_force: PolicyInForce,
        configured: ConfiguredPolicy,
        prover: PolicyVerifier,
        *,
        performs: Iterable[Operation],
        explore_ms: int,
        explore_ms_max: int,
        wake: Callable[[str], None],
        reachable: Callable[[str], bool],
        trusted_keys: Iterable[str] = (),
    ) -> None:
        """Create it closed.

        Args:
            store: has the policies and the instances.
            in_force: set by each switch.
            configured: the policy of the configuration.
            prover: verifies policies.
            performs: the operations of the driver.
            explore_ms: default time limit of the exploration of a policy.
            explore_ms_max: the longest one that a caller may ask for.
            wake: schedules an instance's worker.
            reachable: returns false for a fenced host.
            trusted_keys: public keys whose certificates stand for an exploration.

        Raises:
            Invalid: one of the keys is not a public key.
        """
        self._store = store
        self._in_force = in_force
        self._configured = configured
        self._prover = prover
        self._performs = tuple(performs)
        self._explore_ms = explore_ms
        self._explore_ms_max = explore_ms_max
        self._wake = wake
        self._reachable = reachable
        self._trusted_keys = frozenset(trusted_keys)
        certificates.check_public_keys(self._trusted_keys)
        self._loading = asyncio.Lock()
        self._listeners: list[Callable[[PolicySwitch], None]] = []
        self.bundle: PolicyBundle
        """The text of the active policy."""
        self.now: PolicySwitch
        """The switch that activated it."""

    # ------------------------------------------------------------------------------------------------- at the start

    async def open(self) -> None:
        """Activate the configured policy, the one loaded since it was configured, or the last one if that is invalid.

        Raises:
            PolicyError: the configured policy is invalid and there is no earlier one.
            StoreError: the switch could not be committed.
        """
        last = next(iter(await self._store.policies.switches(1)), None)
        source, wrong = self._configured.source, self._configured.wrong
        if source is None:
            assert wrong is not None
            await self._stay(last, wrong.message, wrong.remedy)
            return
        if last is None or last.configured_digest != source.policy.digest:
            proof = await self._verified_at_start(source, last)
            if not proof.holds:
                self._configured.source = None
                await self._stay(last, against(proof), proof.remedy)
                return
            why = "first policy" if last is None else f"changed since {last.name} was activated"
            await self._begin(source, last, why, proof)
            return
        bundle = await self._store.policies.bundle(last.number) or source.bundle
        live = last.source in {SwitchSource.LOADED, SwitchSource.ROLLED_BACK}
        if not live and bundle != source.bundle:
            await self._begin(source, last, "text changed", Proof(policy=source.policy, walk=last.walk))
            return
        try:
            policy = await asyncio.to_thread(bundles.read, bundle) if live else source.policy
        except PolicyError as error:
            why = f"cannot read {last.name}, which was loaded live: {error.message}"
            await self._begin(source, last, why)
            return
        origin = "loaded" if live else "configured"
        _LOG.info("policy active", policy=policy.name, origin=origin, digest=policy.digest, since_switch=last.number)
        await self._go_on(last, policy, bundle)

    async def _verified_at_start(self, source: Source, last: PolicySwitch | None) -> Proof:
        """Verify the configured policy, which is new."""
        proof = Proof(policy=source.policy)
        if not self._configured.is_builtin:
            proof = await self._prover.prove(source.bundle, self._explore_for_ms(None))
        if last is None and proof.policy is None:
            # It is readable, and there is no earlier policy to fall back to.
            _LOG.warning("configured policy not verified", policy=source.policy.name, why=proof.wrong)
            return Proof(policy=source.policy)
        return proof if last is None or not proof.holds else await self._checked_at_start(source, last, proof)

    async def _checked_at_start(self, source: Source, last: PolicySwitch, proof: Proof) -> Proof:
        """Check the configured policy, which is new, against the outstanding requests."""
        bundle = await self._store.policies.bundle(last.number)
        try:
            policy = None if bundle is None else await asyncio.to_thread(bundles.read, bundle)
        except PolicyError:
            policy = None
        if policy is None:
            return proof  # there is no earlier policy to stay with
        await self._bind(policy)
        return await self._outstanding_check(source.policy, Outstanding.KEEP).run(proof)

    def _outstanding_check(self, policy: Policy, outstanding: Outstanding) -> OutstandingCheck:
        return OutstandingCheck(
            self._store, self._in_force, policy, outstanding, performs=self._performs, reachable=self._reachable
        )

    async def _stay(self, last: PolicySwitch | None, why: str, remedy: str | None) -> None:
        """Keep the last active policy because the configured one is invalid. Raises `PolicyError`."""
        bundle = None if last is None else await self._store.policies.bundle(last.number)
        if last is None or bundle is None:
            raise PolicyError(why, remedy=remedy)
        try:
            policy = await asyncio.to_thread(bundles.read, bundle)
        except PolicyError as error:
            also = f"The last active policy {last.name} cannot be read either: {error.message}"
            raise PolicyError(f"{why} {also}", remedy=remedy) from None
        refused = self._configured.refuse(why, remedy, self._store.now_ms())
        _LOG.error(
            "configured policy rejected, last active policy kept",
            configured=refused.name,
            why=why,
            remedy=remedy,
            stays=policy.name,
            digest=policy.digest,
            since_switch=last.number,
        )
        await self._go_on(last, policy, bundle)

    async def _go_on(self, last: PolicySwitch, policy: Policy, bundle: PolicyBundle) -> None:
        """Activate the policy that was active when the last server stopped."""
        self.bundle = bundle
        self.now = last if policy.digest == last.digest else await self._with_its_meaning(last, policy)
        await self._bind(policy)
        if last.outstanding is Outstanding.REJUDGE and last.cancelled is None:
            await self._judge_again()

    async def _begin(self, source: Source, last: PolicySwitch | None, why: str, proof: Proof | None = None) -> None:
        """Activate the configured policy."""
        policy, self.bundle = source.policy, source.bundle
        switch = self._switch(proof or Proof(policy=policy), policy.digest, SwitchSource.CONFIGURED, _SERVER)
        self.now = msgspec.structs.replace(switch, number=await self._store.policies.switch(switch, self.bundle))
        await self._bind(policy)
        _LOG.info("configured policy activated", policy=policy.name, digest=policy.digest, why=why)
        if last is not None:
            await self._judge_again()

    async def _with_its_meaning(self, last: PolicySwitch, policy: Policy) -> PolicySwitch:
        """Record the digest that this version computes from the same text: decisions refer to it."""
        _LOG.warning("policy digest changed with this version", policy=last.name)
        now_ms = self._store.now_ms()
        switch = msgspec.structs.replace(last, digest=policy.digest, name=policy.name, at_ms=now_ms, by=_SERVER)
        return msgspec.structs.replace(switch, number=await self._store.policies.switch(switch, self.bundle))

    async def _bind(self, policy: Policy) -> None:
        earlier = await earlier_policies.found(self._store, self._performs)
        self._in_force.replace(CompiledPolicy(policy, self._performs), earlier)

    # ---------------------------------------------------------------------------------------------------- switching

    async def load(self, caller: Caller, new: NewPolicy, if_digest: str | None = None) -> Loaded:
        """Verify a policy and activate it. Findings and violations are returned, not raised.

        Raises:
            Forbidden, Invalid (name or files), InUse (another is being loaded), PolicyMismatch,
            StoreError (not committed, and not active).
        """
        caller.require(Role.ADMIN, "load a policy")
        bundle = await asyncio.to_thread(bundle_of, new)
        async with self._alone(if_digest):
            return await self._load(bundle, new, SwitchSource.LOADED, caller.name, certificate=new.certificate)

    async def roll_back(self, caller: Caller, new: OldPolicy, if_digest: str | None = None) -> Loaded:
        """Verify the previous policy, or that of a given switch, and activate it.

        Raises:
            As `load`; NotFound if there is none.
        """
        caller.require(Role.ADMIN, "load a policy")
        async with self._alone(if_digest):
            bundle = await self._former(new.to)
            return await self._load(bundle, new, SwitchSource.ROLLED_BACK, caller.name)

    async def reload(self) -> None:
        """Reload the configured policy and activate it; the result is logged."""
        async with self._loading:
            try:
                source = await asyncio.to_thread(Source.read, self._configured.name)
                if source == self._configured.source and source.bundle == self.bundle:
                    self._configured.take(source)
                    _LOG.info("policy unchanged", policy=self.now.name)
                    return
                loaded = await self._load(source.bundle, Terms(), SwitchSource.RELOADED, _SERVER, configured=source)
            except PolicyError as error:
                self._not_reloaded(error.message, error.remedy)
            except StoreError as error:
                _LOG.error("policy reload failed", why=error.message, remedy=error.remedy, stays=self.now.name)
            else:
                if not loaded.proof.holds:
                    self._not_reloaded(against(loaded.proof), loaded.proof.remedy)

    def _not_reloaded(self, why: str, remedy: str | None) -> None:
        self._configured.refuse(why, remedy, self._store.now_ms())
        _LOG.error("policy reload failed", why=why, remedy=remedy, stays=self.now.name)

    @property
    def refused(self) -> RefusedPolicy | None:
        """Why the configured policy is rejected; None if it is not."""
        return self._configured.refused

    @asynccontextmanager
    async def _alone(self, if_digest: str | None) -> AsyncIterator[None]:
        """Allow one switch at a time. Raises `InUse`, `PolicyMismatch`."""
        if self._loading.locked():
            raise InUse("Another policy is being loaded.", remedy="Retry when that is done.")
        async with self._loading:
            digest = self.now.digest
            if if_digest is not None and not (len(if_digest) >= _DIGEST_LENGTH_MIN and digest.startswith(if_digest)):
                raise PolicyMismatch(
                    f"The active policy is {self.now.name} with the digest {digest}, not {if_digest[:64]}.",
                    remedy="Read the active policy and retry with its digest.",
                )
            yield

    async def _load(
        self,
        bundle: PolicyBundle,
        terms: Terms,
        source: SwitchSource,
        by: str,
        *,
        configured: Source | None = None,
        certificate: SignedCertificate | None = None,
    ) -> Loaded:
        proof = await self._proved(bundle, terms, certificate)
        before = self.now
        same = bundle == self.bundle and terms.outstanding is Outstanding.KEEP and configured is None
        if proof.policy is None or not proof.holds or same:
            return Loaded(proof=proof, before=before, after=before)
        check = self._outstanding_check(proof.policy, terms.outstanding)
        proof = await check.run(proof)
        if not proof.holds or terms.dry_run:
            return Loaded(proof=proof, before=before, after=before)
        taken = configured or self._configured.source
        digest = before.configured_digest if taken is None else taken.policy.digest
        # Until the end of the block no decision is made, so that the check sees what the switch applies to.
        async with self._store.paused():
            proof = await check.run(proof, PAUSED_MS_MAX)
            if proof.policy is None or not proof.holds:
                return Loaded(proof=proof, before=before, after=before)
            switch = self._switch(proof, digest, source, by, terms.outstanding)
            number = await self._store.policies.switch(switch, bundle)
            self.now, self.bundle = msgspec.structs.replace(switch, number=number), bundle
            keeps = terms.outstanding is Outstanding.KEEP
            earlier = earlier_policies.with_latest(self._in_force, self._store.now_ms()) if keeps else ()
            self._in_force.replace(CompiledPolicy(proof.policy, self._performs), earlier)
        if configured is not None:
            self._configured.take(configured)
        self._notify(before)
        await self._judge_again()
        return Loaded(proof=proof, before=before, after=self.now)

    async def _proved(self, bundle: PolicyBundle, terms: Terms, certificate: SignedCertificate | None) -> Proof:
        """Verify a policy; a certificate stands for its exploration."""
        explore_ms = self._explore_for_ms(terms.explore_seconds)
        if certificate is None:
            return await self._prover.prove(bundle, explore_ms)
        proof = await self._prover.prove(bundle, 0)
        if proof.policy is None or not proof.holds:
            return proof
        now = datetime.fromtimestamp(self._store.shown_ms(self._store.now_ms()) / 1000, UTC)
        try:
            walk = certificates.check(certificate, proof.policy.digest, self._trusted_keys, now)
        except Invalid as error:
            return msgspec.structs.replace(proof, wrong=error.message, remedy=error.remedy)
        return msgspec.structs.replace(proof, walk=walk)

    def _switch(
        self,
        proof: Proof,
        configured_digest: str,
        source: SwitchSource,
        by: str,
        outstanding: Outstanding = Outstanding.KEEP,
    ) -> PolicySwitch:
        assert proof.policy is not None
        return PolicySwitch(
            digest=proof.policy.digest,
            name=proof.policy.name,
            at_ms=self._store.now_ms(),
            by=by,
            source=source,
            configured_digest=configured_digest,
            outstanding=outstanding,
            walk=proof.walk,
        )

    def _explore_for_ms(self, seconds: float | None) -> int:
        if seconds is None:
            return min(self._explore_ms, self._explore_ms_max)
        # Written so that NaN is rejected too.
        if not 0 <= seconds * 1000 <= self._explore_ms_max:
            most = f"{self._explore_ms_max / 1000:g}"
            raise Invalid(f"Invalid explore_seconds {seconds:g}: expected 0 to {most}.")
        return round(seconds * 1000)

    # ------------------------------------------------------------------------------------------ after a switch

    async def _judge_again(self) -> None:
        """Evaluate held requests again and, for a switch with `rejudge`, all outstanding ones.

        If the store fails meanwhile, the policy stays active and the next start continues.
        """
        number, rejudges = self.now.number, self.now.outstanding is Outstanding.REJUDGE
        try:
            # Decisions made just before the switch may not be committed yet, and `unsettled` reads committed ones.
            await self._store.settled()
            unsettled = await self._store.unsettled()
            concerned = [one for one in unsettled if one.held or rejudges]
            cancelled = 0
            for begin in range(0, len(concerned), _BATCH):
                batch = concerned[begin : begin + _BATCH]
                cancelled += sum(await asyncio.gather(*(self._judge_one(one.id) for one in batch)))
            if rejudges:
                await self._store.policies.settle(number, cancelled)
                self.now = msgspec.structs.replace(self.now, cancelled=cancelled)
                _LOG.info("outstanding requests evaluated again", switch=number, cancelled=cancelled)
        except StoreError as error:
            _LOG.error("failed to evaluate outstanding requests again", switch=number, why=error.message)
            return
        self._in_force.replace(self._in_force.compiled, earlier_policies.still_binding(self._in_force, unsettled))

    async def _judge_one(self, instance_id: str) -> int:
        def decide(instance: Instance, now_ms: int) -> Change[tuple[str, ...]]:
            policy, reachable = self._in_force.for_waiting(instance), self._reachable(instance.host)
            return lifecycle.rejudge(instance, policy, now_ms, host_reachable=reachable)

        cancelled = await self._store.change(instance_id, decide)
        self._wake(instance_id)
        return len(cancelled)

    def _notify(self, before: PolicySwitch) -> None:
        now = self.now
        _LOG.info(
            "policy switched",
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
        """Call `listener` with the latest switch, now and after each one."""
        self._listeners.append(listener)
        listener(self.now)

    # ------------------------------------------------------------------------------------------------------ history

    async def history(self, limit: int, before: int | None = None) -> tuple[PolicySwitch, ...]:
        """Return the policy switches with a smaller number than `before`, newest first."""
        return await self._store.policies.switches(limit, before)

    async def text(self, number: int) -> PolicyBundle:
        """Return the text of the policy that a switch activated. Raises `NotFound`."""
        bundle = await self._store.policies.bundle(number)
        if bundle is None:
            raise NotFound(f"Policy switch not found: {number}.")
        return bundle

    async def _former(self, number: int | None) -> PolicyBundle:
        if number is not None:
            return await self.text(number)
        before: int | None = self.now.number
        while switches := await self._store.policies.switches(_HISTORY_PAGE, before):
            for switch in switches:
                bundle = await self.text(switch.number)
                if bundle != self.bundle:
                    return bundle
                before = switch.number
        raise NotFound("No earlier policy found.", remedy="Load one by name or file.")
