"""`/v1/policy`: read the policy in force, load another, roll back, and list the history."""

from __future__ import annotations

from typing import Any, Final, TypeVar, assert_never

import msgspec
from starlette.datastructures import QueryParams
from starlette.requests import Request
from starlette.responses import Response

from interlock.api.http import audit_entries, problems, request_parsing
from interlock.api.http.problems import HTTP_PROBLEM_TYPES, PROBLEM_TYPES
from interlock.api.http.route import CURSOR, LIMIT, ApiParts, Parameter, Routes, json_response
from interlock.api.schemas.policy import (
    Policy,
    PolicyBlockedVm,
    PolicyFinding,
    PolicyHistory,
    PolicyLoaded,
    PolicyName,
    PolicyProblem,
    PolicyRule,
    PolicySwitch,
    PolicyText,
    PolicyViolation,
    PolicyWalk,
    RefusedConfiguration,
)
from interlock.api.schemas.serializers import timestamp, wire
from interlock.core.condition_kinds import Takes
from interlock.core.conditions import CONDITIONS
from interlock.core.errors import Invalid, NotFound, PolicyError
from interlock.core.policy import CompiledPolicy, Rule, Verdict
from interlock.core.roles import Role
from interlock.policies.laws import LAWS
from interlock.policies.lint.findings import Severity
from interlock.policies.verification import Proof
from interlock.service.auth import Caller
from interlock.service.configured_policy import RefusedPolicy
from interlock.service.policies import Loaded
from interlock.service.policy_requests import NewPolicy, OldPolicy, Terms

routes = Routes("policy")

TermsT = TypeVar("TermsT", bound=Terms)

TOML: Final = "application/toml"
_DEFAULT_FILE_NAME: Final = "policy.toml"
"""File name of a policy sent as plain TOML."""
_TERMS: Final = ("outstanding", "explore_seconds", "dry_run")
_NUMBER_MAX: Final = 2**53

_PARAMETERS: Final = (
    Parameter(
        "outstanding",
        "`keep` or `rejudge`: whether requests admitted before are evaluated again. Overrides the body.",
        {"type": "string", "enum": ["keep", "rejudge"], "default": "keep"},
    ),
    Parameter(
        "explore_seconds",
        "Time limit of the exploration of its states; 0: none. Overrides the body.",
        {"type": "number", "minimum": 0, "maximum": 86_400},
    ),
    Parameter("dry_run", "Only verify it. Overrides the body.", {"type": "boolean", "default": False}),
    Parameter("If-Match", "The expected digest of the policy in force; 412 if it is another.", where="header"),
)

# --------------------------------------------------------------------------------------------- the policy in force


@routes.add("GET /v1/policy", "Read the policy in force", {200: Policy})
async def policy(parts: ApiParts, _caller: Caller, request: Request) -> Response:
    now, bundle = parts.policies.now, parts.policies.bundle
    shown = msgspec.structs.replace(
        policy_view(parts.instances.policy),
        digest=now.digest,
        number=now.number,
        source=now.source.value,
        loaded_at=timestamp(now.at_ms),
        loaded_by=now.by,
        main=bundle.main,
        files=tuple(sorted(bundle.files)),
        exploration=None if now.walk is None else wire(PolicyWalk, now.walk),
        configured_refused=_refused_configuration(parts.policies.refused),
    )
    return json_response(shown, headers=_etag(now.digest))


def _refused_configuration(refused: RefusedPolicy | None) -> RefusedConfiguration | None:
    if refused is None:
        return None
    at = timestamp(refused.at_ms)
    return RefusedConfiguration(name=refused.name, at=at, why=refused.why, remedy=refused.remedy)


def policy_view(compiled: CompiledPolicy) -> Policy:
    """Return a policy's wire type, without what is known only of the one in force."""
    source = compiled.policy
    rules = tuple(_rule(rule) for rule in compiled.rules)
    return Policy(
        name=source.name,
        digest=source.digest,
        outstanding_max=source.outstanding_max,
        protected_tags=source.protected_tags,
        served_at_most_s={name.value: limit_ms / 1000 for name, limit_ms in source.served_at_most.items()},
        rules=rules,
    )


def _rule(rule: Rule) -> PolicyRule:
    facts = msgspec.structs.asdict(rule)
    return PolicyRule(
        id=rule.id,
        verdict=rule.verdict.value,
        operations=_sorted(rule.operations) or (),
        vm_state=_sorted(rule.vm_states),
        task_state=_sorted(rule.task_states),
        threshold_s=None if rule.threshold_ms is None else rule.threshold_ms / 1000,
        measured_from=rule.measured_from.value if rule.threshold_ms is not None else None,
        before=rule.before.value if rule.verdict is Verdict.AFTER else None,
        grace_s=rule.grace_ms / 1000 if rule.verdict is Verdict.PREEMPT else None,
        served_at_most_s=None if rule.served_at_most_ms is None else rule.served_at_most_ms / 1000,
        **{condition.wire: _condition(condition.kind.takes, condition.of(rule)) for condition in CONDITIONS},
        **{name: facts[name] for name in ("in_turn", "reason", "because", "fixed", "source")},
    )


def _condition(takes: Takes, value: Any) -> Any:
    if value is None:
        return None
    match takes:
        case Takes.FLAG | Takes.COUNT:
            return value
        case Takes.TIME:
            return value / 1000
        case Takes.KINDS | Takes.WORDS | Takes.TEXTS:
            return _sorted(value)
        case _:
            assert_never(takes)


def _sorted(values: frozenset[Any] | None) -> tuple[str, ...] | None:
    return None if values is None else tuple(sorted(str(value) for value in values))


@routes.add(
    "GET /v1/policy/text",
    "Read the text of the policy in force",
    {200: TOML},
    problems=(404,),
    parameters=(Parameter("file", "Another file than the main one."),),
)
async def text(parts: ApiParts, _caller: Caller, request: Request) -> Response:
    bundle = parts.policies.bundle
    name = request.query_params.get("file", bundle.main)
    if name not in bundle.files:
        raise NotFound(
            f"File {name[:80]!r} not found in the policy in force.",
            remedy=f"Its files: {', '.join(sorted(bundle.files))}.",
        )
    return Response(bundle.files[name].encode(), headers=_etag(parts.policies.now.digest), media_type=TOML)


# -------------------------------------------------------------------------------------------------------- switching


@routes.add(
    "PUT /v1/policy",
    "Verify a policy and put it in force",
    {200: PolicyLoaded},
    problems=(409, 412, 507),
    body=NewPolicy,
    audited="policy.switch",
    text=TOML,
    parameters=_PARAMETERS,
    error_422=PolicyProblem,
)
async def load(parts: ApiParts, caller: Caller, request: Request) -> Response:
    caller.require(Role.ADMIN, "load a policy")
    bytes_max = parts.config.policy_body_bytes_max
    if request_parsing.media_type(request) == TOML:
        terms = NewPolicy(
            main=_DEFAULT_FILE_NAME, files={_DEFAULT_FILE_NAME: await request_parsing.text(request, bytes_max)}
        )
    else:
        terms = await request_parsing.body(request, NewPolicy, bytes_max)
    terms = _with_query_terms(terms, request.query_params)
    return _loaded_response(request, terms, await parts.policies.load(caller, terms, _if_match(request)))


@routes.add(
    "POST /v1/policy/rollback",
    "Verify an earlier policy and put it in force again",
    {200: PolicyLoaded},
    problems=(404, 409, 412, 507),
    body=OldPolicy,
    audited="policy.switch",
    parameters=_PARAMETERS,
    error_422=PolicyProblem,
)
async def roll_back(parts: ApiParts, caller: Caller, request: Request) -> Response:
    caller.require(Role.ADMIN, "load a policy")
    # All options have defaults, so the body is optional.
    empty = request.headers.get("content-length", "0") == "0" and "transfer-encoding" not in request.headers
    terms = (
        OldPolicy() if empty else await request_parsing.body(request, OldPolicy, parts.config.request_body_bytes_max)
    )
    terms = _with_query_terms(terms, request.query_params)
    return _loaded_response(request, terms, await parts.policies.roll_back(caller, terms, _if_match(request)))


def _with_query_terms(terms: TermsT, query: QueryParams) -> TermsT:
    """Return the terms, overridden by those of the query. Raises `Invalid`."""
    given = {name: query[name] for name in _TERMS if name in query}
    if not given:
        return terms
    try:
        override = msgspec.convert(given, Terms, strict=False)
    except msgspec.ValidationError as error:
        raise Invalid(f"Invalid query: {error}.") from None
    return msgspec.structs.replace(terms, **{name: getattr(override, name) for name in given})


def _if_match(request: Request) -> str | None:
    """Return the digest in `If-Match`, or None for `*` or no header."""
    tag = request.headers.get("if-match", "*").strip()
    return None if tag == "*" else tag.removeprefix("W/").strip('"').partition("-")[0].lower()


def _loaded_response(request: Request, terms: Terms, loaded: Loaded) -> Response:
    proof, before, after = loaded.proof, loaded.before, loaded.after
    if proof.policy is None or not proof.holds:
        return _rejected_response(request, proof, before.name)
    audit_entries.note(
        request, target=proof.policy.name, details={"digest": proof.policy.digest, "number": after.number}
    )
    loaded_view = PolicyLoaded(
        name=proof.policy.name,
        digest=proof.policy.digest,
        changed=after is not before,
        number=after.number,
        previous=PolicyName(name=before.name, digest=before.digest, number=before.number),
        outstanding=terms.outstanding,
        cancelled=after.cancelled if after is not before else None,
        findings=_findings(proof),
        exploration=None if proof.walk is None else wire(PolicyWalk, proof.walk),
    )
    return json_response(loaded_view, headers=_etag(after.digest))


def _rejected_response(request: Request, proof: Proof, stays: str) -> Response:
    errors = sum(finding.severity is Severity.ERROR for finding in proof.findings)
    laws = sorted({violation.law for violation in proof.violations})
    reasons = [f"its check found {errors} {'error' if errors == 1 else 'errors'}"] if errors else []
    reasons += [f"it violates law {law} ({LAWS[law].name})" for law in laws]
    reasons += [proof.blocked[0].message.rstrip(".")] if proof.blocked else []
    detail = proof.wrong or f"Policy rejected: {' and '.join(reasons)}. {stays} stays in force."
    kind = HTTP_PROBLEM_TYPES["policy-refused"] if proof.policy is not None else PROBLEM_TYPES[PolicyError]
    problem = PolicyProblem(
        type=f"urn:interlock:problem:{kind.name}",
        title=kind.title,
        status=kind.status,
        detail=detail,
        instance=request.url.path,
        remedy=proof.remedy,
        findings=_findings(proof),
        violations=tuple(PolicyViolation(law=one.law, what=one.what, story=one.story) for one in proof.violations),
        blocked=tuple(wire(PolicyBlockedVm, one) for one in proof.blocked),
        exploration=None if proof.walk is None else wire(PolicyWalk, proof.walk),
    )
    return Response(msgspec.json.encode(problem), kind.status, media_type=problems.MEDIA_TYPE)


def _findings(proof: Proof) -> tuple[PolicyFinding, ...]:
    return tuple(wire(PolicyFinding, one, severity=one.severity.value) for one in proof.findings if not one.detail)


def _etag(digest: str) -> dict[str, str]:
    return {"ETag": f'"{digest}"'}


# ---------------------------------------------------------------------------------------------------------- history


@routes.add(
    "GET /v1/policy/history", "List earlier policies, newest first", {200: PolicyHistory}, parameters=(LIMIT, CURSOR)
)
async def history(parts: ApiParts, _caller: Caller, request: Request) -> PolicyHistory:
    query = request.query_params
    limit = request_parsing.integer(query, "limit", 100, 1, 500)
    before = request_parsing.integer(query, "cursor", _NUMBER_MAX, 1, _NUMBER_MAX)
    found = await parts.policies.history(limit + 1, before)
    cursor = str(found[limit - 1].number) if len(found) > limit else None
    return PolicyHistory(items=tuple(wire(PolicySwitch, one) for one in found[:limit]), next_cursor=cursor)


@routes.add("GET /v1/policy/history/{number}", "Read the text of an earlier policy", {200: PolicyText})
async def former_text(parts: ApiParts, _caller: Caller, request: Request) -> PolicyText:
    given = request.path_params["number"]
    if not (given.isascii() and given.isdecimal() and len(given) <= len(str(_NUMBER_MAX)) - 1):
        raise NotFound(f"Policy switch not found: {given[:80]}.")
    number = int(given)
    bundle = await parts.policies.text(number)
    return PolicyText(number=number, main=bundle.main, files=bundle.files)
