"""`/v1/policy`: the policy in force, putting another there, and the history of that."""

from __future__ import annotations

from typing import Any, Final, TypeVar

import msgspec
from starlette.datastructures import QueryParams
from starlette.requests import Request
from starlette.responses import Response

from interlock.api import asking, problems, schemas
from interlock.api.doors import CURSOR, LIMIT, ApiParts, Door, Parameter, answer
from interlock.api.policy_schemas import (
    PolicyFinding,
    PolicyHistory,
    PolicyLoaded,
    PolicyName,
    PolicyProblem,
    PolicySwitch,
    PolicyText,
    PolicyViolation,
    PolicyWalk,
)
from interlock.api.problems import HTTP_KINDS, KINDS
from interlock.api.views import timestamp
from interlock.core import policy_switches
from interlock.core.errors import Invalid, NotFound, PolicyError
from interlock.core.policy import CompiledPolicy, Rule, Verdict
from interlock.policies.findings import Severity
from interlock.policies.proving import Proof
from interlock.ports import Role
from interlock.service.callers import Caller
from interlock.service.configured_policy import RefusedPolicy
from interlock.service.policies import Loaded
from interlock.service.policy_wishes import NewPolicy, OldPolicy, Terms

WishT = TypeVar("WishT", bound=Terms)

TOML: Final = "application/toml"
_SENT_AS: Final = "policy.toml"
"""What a policy's file is called that comes without a name."""
_TERMS: Final = ("outstanding", "explore_seconds", "dry_run")
_NUMBER_MAX: Final = 2**53

# --------------------------------------------------------------------------------------------- the policy in force


async def policy(parts: ApiParts, _caller: Caller, request: Request) -> Response:
    asking.only(request.query_params)
    now, bundle = parts.policies.now, parts.policies.bundle
    shown = msgspec.structs.replace(
        described(parts.instances.policy),
        digest=now.digest,
        number=now.number,
        source=now.source.value,
        loaded_at=timestamp(now.at_ms),
        loaded_by=now.by,
        main=bundle.main,
        files=tuple(sorted(bundle.files)),
        configured_refused=_refused_configuration(parts.policies.refused),
    )
    return answer(shown, headers=_etag(now.digest))


def _refused_configuration(refused: RefusedPolicy | None) -> schemas.RefusedConfiguration | None:
    if refused is None:
        return None
    at = timestamp(refused.at_ms)
    return schemas.RefusedConfiguration(name=refused.name, at=at, why=refused.why, remedy=refused.remedy)


def described(compiled: CompiledPolicy) -> schemas.Policy:
    """What a policy says, as the wire has it."""
    written = compiled.policy
    rules = tuple(_rule(rule) for rule in compiled.rules)
    return schemas.Policy(
        name=written.name, digest=written.digest, outstanding_max=written.outstanding_max, rules=rules
    )


def _rule(rule: Rule) -> schemas.PolicyRule:
    facts = msgspec.structs.asdict(rule)
    return schemas.PolicyRule(
        id=rule.id,
        verdict=rule.verdict.value,
        operations=_sorted(rule.operations) or (),
        vm_state=_sorted(rule.vm_states),
        task_state=_sorted(rule.task_states),
        outstanding=_sorted(rule.outstanding),
        held=_sorted(rule.held),
        roles=_sorted(rule.roles),
        tags=_sorted(rule.tags),
        silent_s_min=None if rule.silent_ms_min is None else rule.silent_ms_min / 1000,
        threshold_s=None if rule.threshold_ms is None else rule.threshold_ms / 1000,
        measured_from=rule.measured_from.value if rule.threshold_ms is not None else None,
        before=rule.before.value if rule.verdict is Verdict.AFTER else None,
        grace_s=rule.grace_ms / 1000 if rule.verdict is Verdict.PREEMPT else None,
        **{name: facts[name] for name in ("locked", "blocked", "launched", "host_reachable", "hard", "in_turn")},
        **{name: facts[name] for name in ("reason", "because", "fixed", "source")},
    )


def _sorted(values: frozenset[Any] | None) -> tuple[str, ...] | None:
    return None if values is None else tuple(sorted(str(value) for value in values))


async def text(parts: ApiParts, _caller: Caller, request: Request) -> Response:
    asking.only(request.query_params, "file")
    bundle = parts.policies.bundle
    name = request.query_params.get("file", bundle.main)
    if name not in bundle.files:
        raise NotFound(
            f"The policy in force has no file {name[:80]!r}.", remedy=f"It has: {', '.join(sorted(bundle.files))}."
        )
    return Response(bundle.files[name].encode(), headers=_etag(parts.policies.now.digest), media_type=TOML)


# -------------------------------------------------------------------------------------------------------- switching


async def load(parts: ApiParts, caller: Caller, request: Request) -> Response:
    caller.require(Role.ADMIN, "load a policy")
    asking.only(request.query_params, *_TERMS)
    bytes_max = parts.config.policy_body_bytes_max
    if asking.media_type(request) == TOML:
        wish = NewPolicy(main=_SENT_AS, files={_SENT_AS: await asking.text(request, bytes_max)})
    else:
        wish = await asking.body(request, NewPolicy, bytes_max)
    wish = _on_terms(wish, request.query_params)
    return _told(request, wish, await parts.policies.load(caller, wish, _if_match(request)))


async def roll_back(parts: ApiParts, caller: Caller, request: Request) -> Response:
    caller.require(Role.ADMIN, "load a policy")
    asking.only(request.query_params, *_TERMS)
    # Every term may be left out, and the body with them.
    empty = request.headers.get("content-length", "0") == "0" and "transfer-encoding" not in request.headers
    wish = OldPolicy() if empty else await asking.body(request, OldPolicy, parts.config.request_body_bytes_max)
    wish = _on_terms(wish, request.query_params)
    return _told(request, wish, await parts.policies.roll_back(caller, wish, _if_match(request)))


def _on_terms(wish: WishT, query: QueryParams) -> WishT:
    """The wish with what the query says of its terms. Raises `Invalid`."""
    given = {name: query[name] for name in _TERMS if name in query}
    if not given:
        return wish
    try:
        terms = msgspec.convert(given, Terms, strict=False)
    except msgspec.ValidationError as error:
        raise Invalid(f"The query is wrong: {error}.") from None
    return msgspec.structs.replace(wish, **{name: getattr(terms, name) for name in given})


def _if_match(request: Request) -> str | None:
    """The digest of `If-Match`, or None for `*` or none at all."""
    tag = request.headers.get("if-match", "*").strip()
    return None if tag == "*" else tag.removeprefix("W/").strip('"').lower()


def _told(request: Request, wish: Terms, loaded: Loaded) -> Response:
    proof, before, after = loaded.proof, loaded.before, loaded.after
    if proof.policy is None or not proof.holds:
        return _refused(request, proof, before.name)
    told = PolicyLoaded(
        name=proof.policy.name,
        digest=proof.policy.digest,
        changed=after is not before,
        number=after.number,
        previous=PolicyName(name=before.name, digest=before.digest, number=before.number),
        outstanding=wish.outstanding,
        cancelled=after.cancelled if after is not before else None,
        findings=_findings(proof),
        exploration=_walk(proof),
    )
    return answer(told, headers=_etag(after.digest))


def _refused(request: Request, proof: Proof, stays: str) -> Response:
    errors = sum(finding.severity is Severity.ERROR for finding in proof.findings)
    laws = sorted({violation.law for violation in proof.violations})
    against = [f"its check found {errors} {'error' if errors == 1 else 'errors'}"] if errors else []
    against += [f"it lets law {law} be broken" for law in laws]
    detail = proof.wrong or f"The policy is refused: {' and '.join(against)}. {stays} stays in force."
    kind = HTTP_KINDS["policy-refused"] if proof.policy is not None else KINDS[PolicyError]
    problem = PolicyProblem(
        type=f"urn:interlock:problem:{kind.name}",
        title=kind.title,
        status=kind.status,
        detail=detail,
        instance=request.url.path,
        remedy=proof.remedy,
        findings=_findings(proof),
        violations=tuple(PolicyViolation(law=one.law, what=one.what, story=one.story) for one in proof.violations),
        exploration=_walk(proof),
    )
    return Response(msgspec.json.encode(problem), kind.status, media_type=problems.MEDIA_TYPE)


def _findings(proof: Proof) -> tuple[PolicyFinding, ...]:
    return tuple(
        PolicyFinding(
            severity=one.severity.value,
            code=one.code,
            rule=one.rule,
            place=one.place,
            message=one.message,
            remedy=one.remedy,
        )
        for one in proof.findings
        if not one.detail
    )


def _walk(proof: Proof) -> PolicyWalk | None:
    return None if proof.walk is None else msgspec.convert(proof.walk, PolicyWalk, from_attributes=True)


def _etag(digest: str) -> dict[str, str]:
    return {"ETag": f'"{digest}"'}


# ---------------------------------------------------------------------------------------------------------- history


async def history(parts: ApiParts, _caller: Caller, request: Request) -> Response:
    query = request.query_params
    asking.only(query, "limit", "cursor")
    limit = asking.number(query, "limit", 100, 1, 500)
    before = asking.number(query, "cursor", _NUMBER_MAX, 1, _NUMBER_MAX)
    found = await parts.policies.history(limit + 1, before)
    cursor = str(found[limit - 1].number) if len(found) > limit else None
    return answer(PolicyHistory(items=tuple(_switch(one) for one in found[:limit]), next_cursor=cursor))


def _switch(one: policy_switches.PolicySwitch) -> PolicySwitch:
    return PolicySwitch(
        number=one.number,
        name=one.name,
        digest=one.digest,
        at=timestamp(one.at_ms),
        by=one.by,
        source=one.source,
        outstanding=one.outstanding,
        cancelled=one.cancelled,
    )


async def former_text(parts: ApiParts, _caller: Caller, request: Request) -> Response:
    asking.only(request.query_params)
    named = request.path_params["number"]
    if not (named.isascii() and named.isdecimal() and len(named) <= len(str(_NUMBER_MAX)) - 1):
        raise NotFound(f"There is no switch of the policy with the number {named[:80]}.")
    number = int(named)
    bundle = await parts.policies.text(number)
    return answer(PolicyText(number=number, main=bundle.main, files=bundle.files))


_PARAMETERS: Final = (
    Parameter(
        "outstanding",
        "`keep` or `rejudge`: what the new policy means to what was admitted before; over what the body says.",
        {"type": "string", "enum": ["keep", "rejudge"], "default": "keep"},
    ),
    Parameter(
        "explore_seconds",
        "For how long its states are walked before; 0: not at all. Over what the body says.",
        {"type": "number", "minimum": 0, "maximum": 86_400},
    ),
    Parameter("dry_run", "Only prove it; over what the body says.", {"type": "boolean", "default": False}),
    Parameter("If-Match", "The digest of the policy thought in force; another answers 412.", where="header"),
)

DOORS: Final = (
    Door(
        method="GET",
        path="/v1/policy",
        endpoint=policy,
        summary="The policy that this server decides by",
        answers={200: schemas.Policy},
        tag="policy",
    ),
    Door(
        method="PUT",
        path="/v1/policy",
        endpoint=load,
        summary="Prove a policy and put it in force",
        body=NewPolicy,
        text=TOML,
        answers={200: PolicyLoaded},
        parameters=_PARAMETERS,
        problems=(409, 412, 507),
        wrong=PolicyProblem,
        tag="policy",
    ),
    Door(
        method="POST",
        path="/v1/policy/rollback",
        endpoint=roll_back,
        summary="Prove an earlier policy and put it in force again",
        body=OldPolicy,
        answers={200: PolicyLoaded},
        parameters=_PARAMETERS,
        problems=(404, 409, 412, 507),
        wrong=PolicyProblem,
        tag="policy",
    ),
    Door(
        method="GET",
        path="/v1/policy/text",
        endpoint=text,
        summary="The text of the policy in force",
        answers={200: TOML},
        parameters=(Parameter("file", "Another of its files than its own."),),
        problems=(404,),
        tag="policy",
    ),
    Door(
        method="GET",
        path="/v1/policy/history",
        endpoint=history,
        summary="The policies that were in force, newest first",
        answers={200: PolicyHistory},
        parameters=(LIMIT, CURSOR),
        tag="policy",
    ),
    Door(
        method="GET",
        path="/v1/policy/history/{number}",
        endpoint=former_text,
        summary="The text of a policy that was in force",
        answers={200: PolicyText},
        problems=(404,),
        tag="policy",
    ),
)
