"""The kinds of findings, each described once: code, severity, meaning, example and remedy.

`interlock policy check --explain`, the grouped output and docs/reference/findings.md read this table.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Final

import msgspec

from interlock.core.policy import Rule
from interlock.policies.lint.findings import Finding, Severity, Written


class FindingKind(msgspec.Struct, frozen=True, kw_only=True):
    """One kind of finding."""

    code: str
    severity: Severity
    """The highest severity that it has."""
    several: str
    """What is wrong with many rules, as a sentence."""
    meaning: str
    remedy: str
    example: str
    """Rules that give this finding: of a policy that extends `standard`, unless it has a [policy] of its own."""

    def text(self) -> str:
        """Return the example as a whole file."""
        return self.example if "[policy]" in self.example else f'[policy]\nextends = "standard"\n\n{self.example}'


def _rule(name: str, operations: str, verdict: str, *conditions: str) -> str:
    lines = [f'id = "{name}"', f"operations = {operations}", *conditions, f'verdict = "{verdict}"']
    return "[[rule]]\n" + "".join(f"{line}\n" for line in lines)


FIXED_REMEDY: Final = "Remove the rule. A policy cannot change what a fixed rule of its base decides."
_ADMIT_DELETE: Final = 'Admit delete there, for some role: verdict = "preempt" at once, or "after" with a threshold.'
_E, _W, _N = Severity.ERROR, Severity.WARNING, Severity.NOTE

_KINDS: Final = (
    FindingKind(
        code="unreadable",
        severity=_E,
        several="Files cannot be read.",
        meaning="The file is not a valid policy. The message has line and column, and the nearest valid word.",
        remedy="Correct the file.",
        example=_rule("typo", '["reboto"]', "deny"),
    ),
    FindingKind(
        code="no-exit",
        severity=_E,
        several="Nothing is ever admitted in some states or circumstances.",
        meaning="In a state, or in a circumstance that rules name (a tag, a held request, a lock, an unreachable "
        "host), every operation is denied to every role, now and later: the instance is stuck.",
        remedy=_ADMIT_DELETE,
        example=_rule("legal-hold", '"*"', "deny", 'tags = ["legal-hold"]'),
    ),
    FindingKind(
        code="delete-refused",
        severity=_E,
        several="No role can ever delete the instance.",
        meaning="In a state, or in a circumstance that rules name, no role can delete the instance: neither at once, "
        "nor after a threshold, nor by soft_delete and a later delete. It is a warning where only a tag or an "
        "unreachable host keeps from it, since tags are removed and hosts come back, and for a VM that has left the "
        "server.",
        remedy=_ADMIT_DELETE,
        example=_rule("let-it-reboot", '["delete", "force_delete", "soft_delete"]', "deny", 'task_state = ["@reboot"]'),
    ),
    FindingKind(
        code="unreachable",
        severity=_E,
        several="Rules never decide: everything that they match is decided before them.",
        meaning="Earlier rules match all that this rule matches. The message names those that are needed for that.",
        remedy="Move the rule before them, narrow them, or remove it.",
        example=_rule("no-stops", '["stop"]', "deny") + _rule("members", '["stop"]', "admit", 'roles = ["member"]'),
    ),
    FindingKind(
        code="contradiction",
        severity=_E,
        several="Rules can never hold: their conditions contradict each other.",
        meaning="No view fulfils all conditions of the rule.",
        remedy="Leave out one of the conditions.",
        example=_rule("idle-stop", '["start"]', "deny", 'task_state = ["@stop"]', 'outstanding = ["none"]'),
    ),
    FindingKind(
        code="windows-never",
        severity=_E,
        several="The time windows of rules never hold.",
        meaning="The windows with `!` in `within` cover the others.",
        remedy="Remove the rule, or change its windows.",
        example=_rule(
            "weekend", '["rebuild"]', "deny", 'within = ["Sat 00:00-Mon 00:00 UTC", "!Sat 00:00-Mon 00:00 UTC"]'
        ),
    ),
    FindingKind(
        code="against-fixed",
        severity=_E,
        several="Rules never decide: fixed rules of the base decide otherwise.",
        meaning="Everything that the rule matches is decided by a fixed rule of the policy that this one extends.",
        remedy=FIXED_REMEDY,
        example=_rule("owners-reset", '["reset_state"]', "admit", 'roles = ["member"]'),
    ),
    FindingKind(
        code="no-promise",
        severity=_E,
        several="Rules admit operations behind others without checking the foreseen state.",
        meaning="With in_turn = false, a request is admitted on the present state alone. It may be cancelled later, "
        "or served in a state that does not permit it: law 2 does not cover it.",
        remedy="Leave in_turn out, so that it must be permitted in the foreseen state too.",
        example=_rule("pause-at-once", '["pause"]', "admit", 'vm_state = ["active"]', "in_turn = false"),
    ),
    FindingKind(
        code="not-performable",
        severity=_E,
        several="Rules admit operations in states in which no driver performs them.",
        meaning="The operation cannot be performed from the vm_state, so that the request would fail. It is a note "
        "where only a reset puts an instance into the state.",
        remedy='Narrow vm_state; "@sources" means the states in which the operation can be performed.',
        example=_rule("unrescue-anything", '["unrescue"]', "admit", 'vm_state = ["active"]', 'task_state = ["none"]'),
    ),
    FindingKind(
        code="threshold-never-passes",
        severity=_E,
        several="Thresholds never pass: other rules decide by then.",
        meaning="A denial names the time at which the request will be admitted, and at that time another rule decides.",
        remedy="Move the rule before the other one, or raise silent_for of that one.",
        example=_rule("hung", '["suspend"]', "deny", 'task_state = ["@suspend"]', 'silent_for = "1m"')
        + _rule("suspend-again", '["suspend"]', "after", 'task_state = ["@suspend"]', 'threshold = "5m"'),
    ),
    FindingKind(
        code="partly-against-fixed",
        severity=_W,
        several="Part of what rules match is decided by fixed rules of the base.",
        meaning="A fixed rule of the policy that this one extends decides otherwise what the rule names.",
        remedy="Leave that part out: it has no effect.",
        example=_rule("all-reset", '["reset_state"]', "admit"),
    ),
    FindingKind(
        code="dead-end",
        severity=_W,
        several="From some states only a deletion or a reset leads on.",
        meaning="Operations lead into the state, and none but a deletion or a reset leads out of it.",
        remedy="Admit what brings the instance back, such as start or rebuild, if it is meant to come back.",
        example=_rule(
            "frozen",
            '["@state", "@component", "!delete", "!force_delete"]',
            "deny",
            'vm_state = ["stopped"]',
            'task_state = ["none"]',
        ),
    ),
    FindingKind(
        code="delete-waits",
        severity=_W,
        several="Delete only waits its turn behind tasks.",
        meaning="Delete is queued behind a task, and neither preempts it nor takes over: if the task hangs, delete "
        "waits for ever.",
        remedy='Give delete the verdict "preempt", or "after" with a threshold.',
        example=_rule("delete-in-turn", '["delete", "force_delete"]', "admit", 'task_state = ["@reboot"]'),
    ),
    FindingKind(
        code="redundant-for-ever",
        severity=_W,
        several="Repeated requests stay redundant however long a task makes no progress.",
        meaning="A repeated request is answered as redundant, and only a deletion or a reset takes over from a hung "
        "task.",
        remedy='Write verdict = "after" with before = "redundant", so that a repeated request takes over at last.',
        example=_rule("rebuild-is-coming", '["rebuild"]', "redundant", 'task_state = ["@rebuild"]')
        + _rule("wait", '["@state", "!delete", "!force_delete"]', "deny", 'task_state = ["@rebuild"]'),
    ),
    FindingKind(
        code="preempt-ring",
        severity=_W,
        several="Operations preempt each other.",
        meaning="Two operations preempt each other, or one itself, so that repeated requests keep them from "
        "completing.",
        remedy='Make a repeated request redundant: verdict = "after" with before = "redundant".',
        example=_rule("stop-first", '["stop"]', "preempt", 'task_state = ["@start"]')
        + _rule("start-first", '["start"]', "preempt", 'task_state = ["@stop"]'),
    ),
    FindingKind(
        code="idle-set",
        severity=_W,
        several="Sets of conditions in `any` never decide.",
        meaning="One of the sets in `any` of a rule contradicts itself, or everything that it matches is decided "
        "before.",
        remedy="Remove it, or change its conditions.",
        example=_rule(
            "freeze", '["rebuild"]', "deny", 'any = [{ tags = ["prod"] }, { tags = ["prod"], locked = true }]'
        ),
    ),
    FindingKind(
        code="windows-always",
        severity=_W,
        several="The time windows of rules always hold.",
        meaning="The windows in `within` leave no gap in the week.",
        remedy="Leave `within` out, or narrow it.",
        example=_rule(
            "always", '["rebuild"]', "deny", 'within = ["Mon-Fri 00:00-24:00 UTC", "Sat 00:00-Mon 01:00 UTC"]'
        ),
    ),
    FindingKind(
        code="nothing-in-flight",
        severity=_W,
        several="Rules measure silence while nothing is in flight.",
        meaning="Without a task, silence is the time since the instance last changed.",
        remedy="Name the task states, or leave the time out.",
        example=_rule(
            "cool-down", '["pause"]', "after", 'task_state = ["none"]', 'outstanding = ["none"]', 'threshold = "1m"'
        ),
    ),
    FindingKind(
        code="threshold-never-refuses",
        severity=_W,
        several="Thresholds never deny anything.",
        meaning="The rule holds only after a silence that is at least its threshold, and takes over at once. Until "
        "then other rules decide, and name no retry time.",
        remedy="Make silent_for shorter than the threshold, so that a denial names the retry time; [thresholds] "
        "changes it too.",
        example=_rule(
            "late", '["suspend"]', "after", 'task_state = ["@suspend"]', 'silent_for = "5m"', 'threshold = "1m"'
        ),
    ),
    FindingKind(
        code="role-left-out",
        severity=_W,
        several="Rules deny members and leave out project_admin.",
        meaning="A rule denies members and not project_admin, which may do what members may, without naming who may.",
        remedy='Name who may: roles = ["*", "!admin"].',
        example=_rule("members-only", '["pause"]', "deny", 'roles = ["member"]'),
    ),
    FindingKind(
        code="members-cannot-delete",
        severity=_N,
        several="Members cannot delete the instance.",
        meaning="Some role can always delete, and a member cannot. That may be meant.",
        remedy="Nothing, if it is meant.",
        example=_rule("staff-deletes", '["delete", "force_delete", "soft_delete"]', "deny", 'roles = ["*", "!admin"]'),
    ),
    FindingKind(
        code="delete-needs-silence",
        severity=_N,
        several="Delete is denied as long as tasks make progress.",
        meaning="Delete takes over only after a time without progress, and nothing limits how long the task may make "
        "progress: a worker that always does keeps it waiting, and only a reset leads on. The refusal says that its "
        "time holds only without progress.",
        remedy='Limit the task with [served_at_most], or write measured_from = "task_started".',
        example=_rule(
            "delete-gives-a-minute",
            '["delete", "force_delete"]',
            "after",
            'task_state = ["@snapshot"]',
            'threshold = "1m"',
        ),
    ),
    FindingKind(
        code="only-deletion",
        severity=_N,
        several="Only a deletion or a reset ends hung tasks.",
        meaning="If the task hangs, no operation but a deletion or a reset takes over.",
        remedy='Add a rule with verdict = "after", which takes over from a task without progress.',
        example=_rule("hands-off", '["*", "!delete", "!force_delete"]', "deny", 'task_state = ["@pause"]'),
    ),
    FindingKind(
        code="takes-nothing-over",
        severity=_N,
        several="Rules preempt or take over for operations that only change the record.",
        meaning="Such an operation completes when it is admitted, and interrupts nothing.",
        remedy='Write verdict = "admit".',
        example=_rule("lock-now", '["lock"]', "preempt"),
    ),
    FindingKind(
        code="never-together",
        severity=_N,
        several="Rules match states and tasks that do not occur together.",
        meaning="No operation is ever in such a phase in such a vm_state.",
        remedy="See the catalogue for the states in which each operation can be performed.",
        example=_rule("odd", '["stop"]', "deny", 'vm_state = ["shelved_offloaded"]', 'task_state = ["@pause"]'),
    ),
    FindingKind(
        code="tag-not-protected",
        severity=_N,
        several="Rules depend on tags that everybody may remove.",
        meaning="Whoever may change the VM may set or remove the tag, and so get around the rule.",
        remedy="If the rule is to bind them, list the tag in protected_tags under [policy].",
        example=_rule("no-pause", '["pause"]', "deny", 'tags = ["gpu"]'),
    ),
    FindingKind(
        code="overruled",
        severity=_N,
        several="Inherited rules are overridden entirely.",
        meaning="Rules of this policy decide everything that an inherited rule matches. Shown with --verbose.",
        remedy="Nothing, if it is meant.",
        example=_rule("no-stops", '["stop"]', "deny"),
    ),
    FindingKind(
        code="idle-part",
        severity=_N,
        several="Rules name operations for which they never decide.",
        meaning="For some of the operations that the rule names, earlier rules decide everything. Shown with "
        "--verbose.",
        remedy="Leave these operations out.",
        example=_rule("no-stops", '["stop"]', "deny") + _rule("neither", '["stop", "pause"]', "deny"),
    ),
    FindingKind(
        code="not-performed",
        severity=_N,
        several="The driver does not perform some operations.",
        meaning="The policy admits operations that the server's driver does not implement; the server denies them.",
        remedy="Nothing; or deny them with a reason of your own.",
        example="",
    ),
    FindingKind(
        code="not-all-seen",
        severity=_N,
        several="The analysis reached its limits.",
        meaning="The rules are too many and too complex: some that never decide may not have been found.",
        remedy="Write fewer rules, with fewer conditions each.",
        example="",
    ),
)

KINDS: Final = {kind.code: kind for kind in _KINDS}
"""All kinds by their codes, the most serious first."""


def finding(
    code: str,
    about: Written | Rule | str,
    message: str,
    *,
    severity: Severity | None = None,
    remedy: str | None = "",
    detail: bool = False,
) -> Finding:
    """Return a finding about a rule, or about the place of a policy as a whole.

    Its severity, and its remedy unless that is None, are those of its kind if they are not given.
    """
    rule = None if isinstance(about, str) else about.id
    place = about if isinstance(about, str) else (about.rule if isinstance(about, Written) else about).source
    kind = KINDS[code]
    return Finding(
        severity=severity or kind.severity,
        code=code,
        rule=rule,
        place=place,
        message=message,
        remedy=kind.remedy if remedy == "" else remedy,
        detail=detail,
    )


class FindingGroup(msgspec.Struct, frozen=True, kw_only=True):
    """The findings of one kind and severity."""

    code: str
    severity: Severity
    summary: str
    """The message of the only finding, or a sentence about all."""
    remedy: str | None
    findings: tuple[Finding, ...]


def grouped(findings: Iterable[Finding]) -> tuple[FindingGroup, ...]:
    """Group findings by kind and severity: the most serious first, and then those of the most serious kind."""
    together: dict[tuple[Severity, str], list[Finding]] = {}
    for one in findings:
        together.setdefault((one.severity, one.code), []).append(one)
    severities, codes = tuple(Severity), (*KINDS, *(code for _, code in together))
    groups = sorted(together.items(), key=lambda item: (severities.index(item[0][0]), codes.index(item[0][1])))
    return tuple(_group(severity, code, each) for (severity, code), each in groups)


def _group(severity: Severity, code: str, findings: list[Finding]) -> FindingGroup:
    # A newer server may send a code that is not known here.
    kind, first = KINDS.get(code), findings[0]
    if kind is None or len(findings) == 1:
        summary, remedy = first.message, first.remedy
    else:
        summary, remedy = kind.several, kind.remedy
    return FindingGroup(code=code, severity=severity, summary=summary, remedy=remedy, findings=tuple(findings))
