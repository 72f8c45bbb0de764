"""Schema of the policy language: every section and key of a file, its type and its meaning.

The loader, the JSON Schema for editors and the reference are generated from these tables.
"""

from __future__ import annotations

import re
from enum import Enum, StrEnum
from typing import Any, Final

import msgspec

from interlock.core.conditions import CONDITIONS, Condition
from interlock.core.durations import EXPECTED
from interlock.core.policy import DEFAULT_GRACE_MS, DEFAULT_OUTSTANDING_MAX, Before, MeasuredFrom, Verdict

FILE_SIZE_MAX_BYTES: Final = 512 * 1024
"""The size limit of a file together with the files that it extends."""
RULES_MAX: Final = 2_000
EXPANDED_RULES_MAX: Final = 10_000
"""The limit of rules after expansion, including those of extended policies."""
SETS_MAX: Final = 200
OUTSTANDING_MAX_LIMIT: Final = 10_000
EXTENDS_DEPTH_MAX: Final = 16
TEXT_LENGTH_MAX: Final = 1_000
ID_LENGTH_MAX: Final = 100
WORD_LENGTH_MAX: Final = 64
TEXTS_MAX: Final = 64
SETS_IN_RULE_MAX: Final = 64
COUNT_MAX: Final = 1_000_000_000
"""The limit of a number in a condition."""
NAMES_MAX: Final = 8
"""The limit of custom names for one word."""

UNLIMITED: Final = "unlimited"
ADMITTING: Final = (Verdict.ADMIT, Verdict.PREEMPT, Verdict.AFTER)
THRESHOLD_PLACEHOLDER: Final = "{threshold}"
"""In `because`: the rule's threshold."""

ID: Final = re.compile(rf"[A-Za-z0-9][A-Za-z0-9._-]{{0,{ID_LENGTH_MAX - 1}}}", re.ASCII)
CODE: Final = re.compile(rf"[a-z][a-z0-9_]{{0,{WORD_LENGTH_MAX - 1}}}", re.ASCII)
SET_NAME: Final = re.compile(rf"[a-z][a-z0-9_]{{0,{WORD_LENGTH_MAX - 1}}}", re.ASCII)
NAME: Final = re.compile(rf"[A-Za-z0-9_-]{{1,{WORD_LENGTH_MAX}}}", re.ASCII)


class Takes(Enum):
    """The type of a key's value, as the reference names it."""

    TEXT = "text"
    ID = "id"
    CODE = "code"
    FLAG = "true, false"
    TIME = "time"
    LIMIT = "time, unlimited"
    CHOICE = "one of"
    COUNT = "number"
    POLICY = "policy"
    OPERATIONS = "operations"
    VM_STATES = "vm_states"
    TASK_STATES = "task_states"
    KINDS = "operations or none"
    WORDS = "words"
    TEXTS = "texts"
    SETS = "sets of conditions"


class Key(msgspec.Struct, frozen=True, kw_only=True):
    name: str
    takes: Takes
    meaning: str
    choices: type[StrEnum] | None = None
    """For `Takes.CHOICE`."""
    default: str | None = None
    """The default, as it would be written; None if there is none."""
    verdicts: tuple[Verdict, ...] = ()
    """The only verdicts with which the key is valid; empty: any."""
    required: bool = False
    example: Any = None
    condition: Condition | None = None
    """The condition, if it is one of `conditions.CONDITIONS`."""


def _condition_key(condition: Condition) -> Key:
    takes = Takes[condition.kind.takes.name]
    return Key(
        name=condition.key,
        takes=takes,
        meaning=condition.meaning,
        example=condition.example,
        condition=condition,
        verdicts=(Verdict.DENY,) if condition.reads == "approver" else (),
    )


RULE_KEYS: Final = (
    Key(
        name="id",
        takes=Takes.ID,
        meaning="Names the rule in answers. Unique, also among the rules of extended policies.",
        required=True,
        example="patient-backups",
    ),
    Key(
        name="operations",
        takes=Takes.OPERATIONS,
        meaning="The operations that the rule matches.",
        required=True,
        example=["stop", "reboot"],
    ),
    Key(
        name="vm_state",
        takes=Takes.VM_STATES,
        meaning="The vm_states that the rule matches. Default, or `*`: every state but `deleted`.",
        default='"*"',
        example=["active", "paused"],
    ),
    Key(
        name="task_state",
        takes=Takes.TASK_STATES,
        meaning="The phase of the state change in service; `none` if there is none.",
        default='"*"',
        example=["@reboot"],
    ),
    *map(_condition_key, CONDITIONS),
    Key(
        name="any",
        takes=Takes.SETS,
        meaning="Sets of conditions, of which one must hold besides the rule's own conditions. Each may have every "
        "condition that the rule itself does not have, `vm_state` and `task_state` among them.",
        example=[{"tags": ["gpu"]}, {"roles": ["member"], "locked": True}],
    ),
    Key(
        name="verdict",
        takes=Takes.CHOICE,
        choices=Verdict,
        meaning="The decision about the operations that the rule matches.",
        required=True,
        example="deny",
    ),
    Key(
        name="threshold",
        takes=Takes.TIME,
        meaning="How long the request in flight must have made no progress. Required, and greater than zero.",
        verdicts=(Verdict.AFTER,),
        example="3m",
    ),
    Key(
        name="measured_from",
        takes=Takes.CHOICE,
        choices=MeasuredFrom,
        meaning="Where the threshold is measured from: the last progress, or the start of the task.",
        default='"last_progress"',
        verdicts=(Verdict.AFTER,),
        example="task_started",
    ),
    Key(
        name="before",
        takes=Takes.CHOICE,
        choices=Before,
        meaning="The answer until the threshold has passed.",
        default='"deny"',
        verdicts=(Verdict.AFTER,),
        example="redundant",
    ),
    Key(
        name="grace",
        takes=Takes.TIME,
        meaning="How long the request in flight has to stop before it is fenced.",
        default=f'"{DEFAULT_GRACE_MS // 1000}s"',
        verdicts=(Verdict.PREEMPT,),
        example="30s",
    ),
    Key(
        name="served_at_most",
        takes=Takes.LIMIT,
        meaning="How long the request may be served in total, from the moment it is taken, with progress or without. "
        "Then it is interrupted, fenced after a grace period of "
        f"{DEFAULT_GRACE_MS // 1000} seconds, and fails with the reason `served_too_long`.",
        default="that of `[served_at_most]`",
        verdicts=ADMITTING,
        example="10m",
    ),
    Key(
        name="approve_within",
        takes=Takes.TIME,
        meaning="How long a request waits for the approval that `unless_approved_by` demands.",
        default='"24h"',
        verdicts=(Verdict.DENY,),
        example="2h",
    ),
    Key(
        name="in_turn",
        takes=Takes.FLAG,
        meaning="Whether the request must also be permitted in the foreseen state. With `false` law 2 does not hold "
        "for it, and it stays queued while the present or the foreseen state permits it.",
        default="true",
        verdicts=(Verdict.ADMIT,),
        example=False,
    ),
    Key(
        name="reason",
        takes=Takes.CODE,
        meaning="The stable reason code for clients: small letters, digits and `_`.",
        example="no_sign_of_life",
    ),
    Key(
        name="because",
        takes=Takes.TEXT,
        meaning="The reason for people. With verdict `after`, `{threshold}` in it stands for the rule's threshold, "
        "also one from `[thresholds]`: `3 minutes`.",
        example="A paused builder blocks the pipeline.",
    ),
    Key(
        name="fixed",
        takes=Takes.FLAG,
        meaning="Whether policies that extend this one cannot override the rule. Fixed rules come first in their file.",
        default="false",
        example=True,
    ),
    Key(
        name="exceptions",
        takes=Takes.OPERATIONS,
        meaning="The operations that a policy that extends this one may take out of a fixed rule, in `[exceptions]`.",
        default="none",
        example=["delete"],
    ),
)
"""Every key that a rule may have, in the order of the reference."""
CONDITION_KEYS: Final = ("vm_state", "task_state", *(condition.key for condition in CONDITIONS))
"""The conditions, as a set of `any` may have them."""

HEADER_KEYS: Final = (
    Key(
        name="name",
        takes=Takes.TEXT,
        meaning="The name of the policy in answers.",
        default="the name of its file",
        example="my-cloud",
    ),
    Key(
        name="extends",
        takes=Takes.POLICY,
        meaning="A built-in policy by its name, or another file by its path relative to this one (with a `/`, or "
        "ending in `.toml`). Its rules are evaluated after those of this file, its fixed ones before them.",
        example="standard",
    ),
    Key(
        name="outstanding_max",
        takes=Takes.COUNT,
        meaning=f"How many requests may be outstanding for one instance, and how many held: 1 to "
        f"{OUTSTANDING_MAX_LIMIT}.",
        default=f"that of the extended policy, or {DEFAULT_OUTSTANDING_MAX}",
        example=8,
    ),
    Key(
        name="protected_tags",
        takes=Takes.TEXTS,
        meaning="Tags that only an admin may set or remove; `gpu-*` stands for every tag that begins with `gpu-`. "
        "Those of the extended policy are protected too.",
        default="those of the extended policy",
        example=["freeze", "gpu-*"],
    ),
    Key(name="description", takes=Takes.TEXT, meaning="What the policy is for.", example="Our cloud."),
)
"""Every key of `[policy]`."""

SECTIONS: Final = {
    "policy": "The name of the policy, and the policy it extends.",
    "sets": 'Named groups of words: with `power = ["start", "stop"]`, `@power` may be used in any list of a rule, in '
    "other sets and in policies that extend this one.",
    "names": "Custom names for an operation (`crash_dump`), the hard variant of one (`reboot_hard`) or a task state "
    "(`powering_off`): one name, or a list of several. Tables show them, and rules and sets may use them where "
    "unambiguous. Policies that extend this one inherit them.",
    "thresholds": 'Other thresholds for `after` rules of the extended policy, by id: `"silent-power" = "5m"`. The id '
    'of a rule that expands to one for each operation changes all of them; `"silent-power.stop"` changes one. Not for '
    'fixed rules, and not for rules of the same file. `"silent-power" = { threshold = "5s", silent_for = "2s" }` '
    "changes a rule's `silent_for` too, or alone.",
    "exceptions": 'Operations that rules of the extended policy do not match any more, by id: `"locked" = ["delete"]`. '
    "Of a fixed rule, those that its key `exceptions` lists.",
    "served_at_most": 'How long a request may be served in total, by operation: `pause = "10m"`, or `"unlimited"`. '
    "It holds for requests whose rule has no `served_at_most`. Policies that extend this one inherit it.",
    "rule": "One rule; `[[rule]]` may be repeated. All of its conditions must hold; one that is left out always does. "
    "The first rule that matches decides; if none does, the request is denied.",
}
"""The sections of a file."""

VERDICTS: Final = {
    Verdict.ADMIT: "Queue the request and serve it in turn. Unless `in_turn = false`, it must also be permitted in the "
    "foreseen state, which holds when everything outstanding has succeeded.",
    Verdict.REDUNDANT: "Already the case, or in progress.",
    Verdict.DENY: "Deny the request.",
    Verdict.PREEMPT: "Put the request at the head of the queue. The request in flight is interrupted, and fenced if it "
    "does not confirm within `grace`.",
    Verdict.AFTER: "Deny the request, with the time at which it will be admitted: `threshold` after the last progress "
    "of the request in flight. From then on it takes over.",
}

TIMES: Final = f"{EXPECTED[0].upper()}{EXPECTED[1:]}."

LIMITS: Final = (
    ("size of a file, with the files that it extends", f"{FILE_SIZE_MAX_BYTES // 1024} KiB"),
    ("rules in a file", f"{RULES_MAX:,}"),
    ("rules of a policy after expansion, with those it extends", f"{EXPANDED_RULES_MAX:,}"),
    ("policies that extend each other", str(EXTENDS_DEPTH_MAX)),
    ("sets in a file", str(SETS_MAX)),
    ("names for one word", str(NAMES_MAX)),
    ("tags in a rule", str(TEXTS_MAX)),
    ("sets of conditions in a rule", str(SETS_IN_RULE_MAX)),
    ("characters of a text", f"{TEXT_LENGTH_MAX:,}"),
    ("characters of an id", str(ID_LENGTH_MAX)),
    ("characters of a reason, the name of a set, or one of `[names]`", str(WORD_LENGTH_MAX)),
)
"""The limits, for the reference."""
