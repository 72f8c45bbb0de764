"""The definitions of the policy language: every part and key of a file, what it takes and what it means.

Reading, the JSON Schema for editors and the reference are all made from these tables. Words are in `vocabulary`.
"""

from __future__ import annotations

import re
from enum import Enum, StrEnum
from typing import Any, Final

import msgspec

from interlock.core.policy import DEFAULT_GRACE_MS, DEFAULT_OUTSTANDING_MAX, Before, MeasuredFrom, Verdict
from interlock.policies.durations import EXPECTED

FILE_SIZE_MAX_BYTES: Final = 512 * 1024
"""How long a file may be, and all that it extends together with it."""
RULES_MAX: Final = 2_000
EXPANDED_RULES_MAX: Final = 10_000
"""How many rules those of a policy may stand for, where one is a rule for each operation; with what it extends."""
SETS_MAX: Final = 200
OUTSTANDING_MAX_LIMIT: Final = 10_000
EXTENDS_DEPTH_MAX: Final = 16
TEXT_LENGTH_MAX: Final = 1_000
ID_LENGTH_MAX: Final = 100
WORD_LENGTH_MAX: Final = 64
TAGS_MAX: Final = 64
NAMES_MAX: Final = 8
"""How many names one word may have."""

ID: Final = re.compile(rf"[A-Za-z0-9][A-Za-z0-9._-]{{0,{ID_LENGTH_MAX - 1}}}", re.ASCII)
CODE: Final = re.compile(rf"[a-z][a-z0-9_]{{0,{WORD_LENGTH_MAX - 1}}}", re.ASCII)
SET_NAME: Final = re.compile(rf"[a-z][a-z0-9_]{{0,{WORD_LENGTH_MAX - 1}}}", re.ASCII)
NAME: Final = re.compile(rf"[A-Za-z0-9_-]{{1,{WORD_LENGTH_MAX}}}", re.ASCII)


class Takes(Enum):
    """What may stand behind a key, with how the reference calls it."""

    TEXT = "text"
    ID = "id"
    CODE = "code"
    FLAG = "true, false"
    TIME = "time"
    CHOICE = "one of"
    COUNT = "number"
    POLICY = "policy"
    OPERATIONS = "operations"
    VM_STATES = "vm_states"
    TASK_STATES = "task_states"
    KINDS = "operations or none"
    ROLES = "roles"
    TAGS = "tags"


class Key(msgspec.Struct, frozen=True, kw_only=True):
    """One key."""

    name: str
    takes: Takes
    meaning: str
    choices: type[StrEnum] | None = None
    """For `Takes.CHOICE`."""
    default: str | None = None
    """What holds if it is left out, as it would be written; None where there is nothing to say."""
    verdict: Verdict | None = None
    """The verdict with which alone it means something."""
    required: bool = False
    example: Any = None


RULE_KEYS: Final = (
    Key(
        name="id",
        takes=Takes.ID,
        meaning="Names the rule, in every answer that it gives; no two rules may share one, also not with an extended "
        "policy.",
        required=True,
        example="patient-backups",
    ),
    Key(
        name="operations",
        takes=Takes.OPERATIONS,
        meaning="The operations that the rule is about.",
        required=True,
        example=["stop", "reboot"],
    ),
    Key(
        name="vm_state",
        takes=Takes.VM_STATES,
        meaning="The states of the instance. Left out, or `*`: every state but `deleted`.",
        default='"*"',
        example=["active", "paused"],
    ),
    Key(
        name="task_state",
        takes=Takes.TASK_STATES,
        meaning="The phase of the state change that is being served; `none` if there is none.",
        default='"*"',
        example=["@reboot"],
    ),
    Key(
        name="outstanding",
        takes=Takes.KINDS,
        meaning='Holds if any of these kinds is waiting or in flight; `["none"]` if nothing is.',
        example=["@same"],
    ),
    Key(
        name="held",
        takes=Takes.KINDS,
        meaning='Holds if a request of any of these kinds is held until the policy admits it; `["none"]` if none is.',
        example=["stop"],
    ),
    Key(name="roles", takes=Takes.ROLES, meaning="The caller's role.", example=["member"]),
    Key(name="locked", takes=Takes.FLAG, meaning="Whether the instance is locked.", example=True),
    Key(
        name="blocked",
        takes=Takes.FLAG,
        meaning="Whether the instance's own list of blocked operations names the operation.",
        example=True,
    ),
    Key(name="tags", takes=Takes.TAGS, meaning="Holds if the instance has any of these tags.", example=["build"]),
    Key(name="host_reachable", takes=Takes.FLAG, meaning="Whether the instance's host can be reached.", example=False),
    Key(
        name="launched",
        takes=Takes.FLAG,
        meaning="Whether a hypervisor has ever held the instance's guest.",
        example=True,
    ),
    Key(
        name="hard",
        takes=Takes.FLAG,
        meaning="Whether the hard variant of the operation is asked for.",
        example=True,
    ),
    Key(
        name="silent_for",
        takes=Takes.TIME,
        meaning="Holds if what is in flight has shown no life for at least so long.",
        example="15s",
    ),
    Key(
        name="verdict",
        takes=Takes.CHOICE,
        choices=Verdict,
        meaning="What the rule says of the operations that it matches.",
        required=True,
        example="deny",
    ),
    Key(
        name="threshold",
        takes=Takes.TIME,
        meaning="How long what is in flight must have shown no life. Must be there, and more than nothing.",
        verdict=Verdict.AFTER,
        example="3m",
    ),
    Key(
        name="measured_from",
        takes=Takes.CHOICE,
        choices=MeasuredFrom,
        meaning="Whether progress counts as life (`last_progress`), or only the beginning does (`task_started`).",
        default='"last_progress"',
        verdict=Verdict.AFTER,
        example="task_started",
    ),
    Key(
        name="before",
        takes=Takes.CHOICE,
        choices=Before,
        meaning="The answer until the threshold has passed.",
        default='"deny"',
        verdict=Verdict.AFTER,
        example="redundant",
    ),
    Key(
        name="grace",
        takes=Takes.TIME,
        meaning="How long what is in flight has to stop by itself.",
        default=f'"{DEFAULT_GRACE_MS // 1000}s"',
        verdict=Verdict.PREEMPT,
        example="30s",
    ),
    Key(
        name="in_turn",
        takes=Takes.FLAG,
        meaning="Whether the request must be permitted in the foreseen state too.",
        default="true",
        verdict=Verdict.ADMIT,
        example=False,
    ),
    Key(
        name="reason",
        takes=Takes.CODE,
        meaning="The stable code that a client sees, in small letters, digits and `_`.",
        example="no_sign_of_life",
    ),
    Key(
        name="because",
        takes=Takes.TEXT,
        meaning="The same for people.",
        example="A paused builder blocks the pipeline.",
    ),
    Key(
        name="fixed",
        takes=Takes.FLAG,
        meaning="Whether nothing that extends this policy may change what the rule decides. Fixed rules come first in "
        "their file.",
        default="false",
        example=True,
    ),
)
"""Every key that a rule may have, in the order of the reference."""

HEADER_KEYS: Final = (
    Key(
        name="name",
        takes=Takes.TEXT,
        meaning="What the policy is called wherever it decides.",
        default="the name of its file",
        example="my-cloud",
    ),
    Key(
        name="extends",
        takes=Takes.POLICY,
        meaning="A built-in policy by its name, or another file by its path relative to this one (with a `/`, or "
        "ending in `.toml`). Its rules are asked after those of this file, its fixed ones before them.",
        example="standard",
    ),
    Key(
        name="outstanding_max",
        takes=Takes.COUNT,
        meaning=f"How many requests may be outstanding for one instance, and how many held: 1 to "
        f"{OUTSTANDING_MAX_LIMIT}.",
        default=f"what the extended policy has, or {DEFAULT_OUTSTANDING_MAX}",
        example=8,
    ),
    Key(name="description", takes=Takes.TEXT, meaning="What the policy is for.", example="Our cloud."),
)
"""Every key of `[policy]`."""

SECTIONS: Final = {
    "policy": "What the policy is called, and what it extends.",
    "sets": 'Groups of words for its own use: `power = ["start", "stop"]` is `@power` in any list of a rule, also in '
    "that of another set and in a policy that extends this one.",
    "names": "What the policy's own world calls an operation (`crash_dump`), the hard variant of one (`reboot_hard`) "
    "or a task state (`powering_off`): one name, or a list of several. Tables show them, and the rules and sets of the "
    "file may be written with them where it is clear which word is meant. What extends the policy has them too.",
    "thresholds": 'Other thresholds for `after` rules of what is extended, by id: `"silent-power" = "5m"`. The id of a '
    'rule that stands for several, one an operation, means all of them, and `"silent-power.stop"` means one. Not for '
    "fixed rules, and not for the file's own.",
    "rule": "One rule. `[[rule]]` has two brackets, since there are many. Every condition that is written must hold; "
    "one that is left out always does. The first rule that matches decides, and if none does the request is denied.",
}
"""The parts of a file."""

VERDICTS: Final = {
    Verdict.ADMIT: "Keep the request and serve it in turn. Unless `in_turn = false`, it must also be permitted in the "
    "foreseen state, the one that holds when everything outstanding has succeeded.",
    Verdict.REDUNDANT: "It holds already, or is on its way.",
    Verdict.DENY: "Refuse it.",
    Verdict.PREEMPT: "Keep it before everything that waits. What is in flight is asked to stop, and loses its right to "
    "act if it has not confirmed within `grace`.",
    Verdict.AFTER: "Refuse it, with the moment at which it will be admitted: `threshold` after the last sign of life "
    "of what is in flight. From then on it takes over.",
}

TIMES: Final = f"{EXPECTED[0].upper()}{EXPECTED[1:]}."

LIMITS: Final = (
    ("size of a file, with everything that it extends", f"{FILE_SIZE_MAX_BYTES // 1024} KiB"),
    ("rules in a file", f"{RULES_MAX:,}"),
    ("rules that those of a policy and of what it extends stand for, one an operation", f"{EXPANDED_RULES_MAX:,}"),
    ("policies that extend one another", str(EXTENDS_DEPTH_MAX)),
    ("sets in a file", str(SETS_MAX)),
    ("names for one word", str(NAMES_MAX)),
    ("tags in a rule", str(TAGS_MAX)),
    ("characters of a text", f"{TEXT_LENGTH_MAX:,}"),
    ("characters of an id", str(ID_LENGTH_MAX)),
    ("characters of a reason, the name of a set, or one of `[names]`", str(WORD_LENGTH_MAX)),
)
"""What there may be at most, for the reference."""
