"""Who locks, and who sets a tag: what binds a caller, the caller cannot take away."""

from __future__ import annotations

from pathlib import Path

import pytest
from policy_samples import Play, instance, said

from interlock.core.errors import Forbidden, PolicyError
from interlock.core.lifecycle import relabel
from interlock.core.operations import Operation
from interlock.core.policy import CompiledPolicy
from interlock.core.records import Denied, Instance, Submission
from interlock.core.roles import Role
from interlock.core.states import VmState
from interlock.policies.comparison import differ
from interlock.policies.explanation.explainer import Turn, ways
from interlock.policies.language.loader import builtin_names, compile_named, load
from interlock.policies.lint import check_file
from interlock.policies.rehearsal.runner import rehearse

POLICIES = {name: compile_named(name) for name in builtin_names()}
FREEZE = """
[policy]
name = "site"
extends = "standard"
{protected}
[[rule]]
id = "frozen"
operations = ["stop", "reboot"]
roles = ["*", "!admin"]
tags = ["freeze"]
verdict = "deny"
reason = "frozen"
because = "The VM is frozen."
"""
PROTECTED = 'protected_tags = ["freeze", "gpu-*"]\n'


def write(folder: Path, text: str, name: str = "site.toml") -> Path:
    path = folder / name
    path.write_text(text)
    return path


@pytest.fixture
def site(tmp_path: Path) -> CompiledPolicy:
    return compile_named(write(tmp_path, FREEZE.format(protected=PROTECTED)))


def tagged(vm: Instance, policy: CompiledPolicy, role: Role, *tags: str) -> Instance:
    return relabel(vm, policy, "ann", 1, role=role, tags=tags).answer


# ------------------------------------------------------------------------------------------------------------ locks


@pytest.mark.parametrize("name", sorted(POLICIES))
def test_the_lock_of_an_admin_is_for_admins_to_remove(name: str) -> None:
    play = Play(POLICIES[name], instance(VmState.ACTIVE))
    assert said(play.submit(Operation.LOCK, role=Role.ADMIN))[0] == "admitted"
    for role in (Role.MEMBER, Role.PROJECT_ADMIN):
        answer = play.submit(Operation.UNLOCK, role=role)
        assert isinstance(answer, Denied)
        assert (answer.reason, answer.because) == ("locked", "An admin locked the VM. Only an admin can unlock it.")
        play.submit(Operation.LOCK, role=role)
        assert play.instance.lock_role is Role.ADMIN
    assert said(play.submit(Operation.UNLOCK, role=Role.ADMIN))[0] == "admitted"
    assert (play.instance.locked_by, play.instance.lock_role) == (None, Role.MEMBER)


@pytest.mark.parametrize("name", sorted(POLICIES))
def test_the_lock_of_a_member_is_for_members_to_remove_until_an_admin_locks_too(name: str) -> None:
    play = Play(POLICIES[name], instance(VmState.ACTIVE))
    assert said(play.submit(Operation.LOCK))[0] == "admitted"
    assert said(play.submit(Operation.LOCK))[0] == "redundant"
    assert said(play.submit(Operation.UNLOCK, role=Role.PROJECT_ADMIN))[0] == "admitted"
    play.submit(Operation.LOCK)
    assert said(play.submit(Operation.LOCK, role=Role.ADMIN))[0] == "admitted"
    assert said(play.submit(Operation.UNLOCK))[0] == "denied"
    assert said(play.submit(Operation.LOCK, role=Role.ADMIN))[0] == "redundant"


def test_whom_a_lock_binds_cannot_change_the_labels_of_the_vm() -> None:
    policy = POLICIES["standard"]
    locked = instance(VmState.ACTIVE, locked_by="root", lock_role=Role.ADMIN, blocked_operations=(Operation.DELETE,))
    with pytest.raises(Forbidden, match="the VM vm is locked by root") as refused:
        tagged(locked, policy, Role.MEMBER, "other")
    assert refused.value.remedy == "Ask an admin to unlock it."
    with pytest.raises(Forbidden):
        relabel(locked, policy, "ann", 1, role=Role.PROJECT_ADMIN, blocked_operations=())
    assert relabel(locked, policy, "ann", 1, blocked_operations=(Operation.DELETE,)).answer is locked
    assert tagged(locked, policy, Role.ADMIN, "other").tags == ("other",)
    own = instance(VmState.ACTIVE, locked_by="ann")
    with pytest.raises(Forbidden) as refused:
        tagged(own, policy, Role.MEMBER, "other")
    assert refused.value.remedy == "Unlock it first: `interlock vm unlock vm`."


def test_a_rehearsal_begins_with_the_lock_of_an_admin(site: CompiledPolicy) -> None:
    for role, expected in (("member", '"admitted"'), ("admin", '"locked-above"')):
        begin = f'{{"instance": {{"vm_state": "active", "locked": true, "lock_role": "{role}", "role": "member"}}}}'
        _, answer = rehearse([begin, '{"submit": "unlock"}'], site)
        assert expected in answer.decode()


# ------------------------------------------------------------------------------------------------------------- tags


def test_a_protected_tag_is_set_and_removed_by_admins_only(site: CompiledPolicy) -> None:
    frozen = instance(VmState.ACTIVE, tags=("freeze", "web"))
    for role in (Role.MEMBER, Role.PROJECT_ADMIN):
        with pytest.raises(Forbidden, match="only an admin may set or remove the tag freeze"):
            tagged(frozen, site, role, "web")
        with pytest.raises(Forbidden, match="the tags gpu-a100, gpu-b200"):
            tagged(frozen, site, role, "freeze", "gpu-a100", "gpu-b200")
        assert tagged(frozen, site, role, "freeze").tags == ("freeze",)
    assert tagged(frozen, site, Role.ADMIN, "gpu-a100").tags == ("gpu-a100",)


def test_a_member_does_not_get_around_a_rule_by_taking_its_tag_off(site: CompiledPolicy) -> None:
    script = [
        '{"instance": {"vm_state": "active", "tags": ["freeze"], "role": "member"}}',
        '{"submit": "stop"}',
        '{"relabel": []}',
        '{"submit": "stop"}',
        '{"relabel": [], "role": "admin"}',
        '{"submit": "stop"}',
    ]
    answers = [line.decode() for line in rehearse(script, site)]
    assert '"frozen"' in answers[1]
    assert '"reason":"forbidden"' in answers[2].replace(" ", "")
    assert answers[3] == answers[1]
    assert '"admitted"' in answers[5]


def test_protected_tags_are_inherited_and_count_in_the_digest_and_the_difference(tmp_path: Path) -> None:
    write(tmp_path, FREEZE.format(protected=PROTECTED), "base.toml")
    text = '[policy]\nextends = "./base.toml"\nprotected_tags = ["prod"]\n'
    more = load(write(tmp_path, text))
    assert more.protected_tags == ("freeze", "gpu-*", "prod")
    free = load(write(tmp_path, FREEZE.format(protected=""), "free.toml"))
    base = load(tmp_path / "base.toml")
    assert len({free.digest, base.digest, more.digest}) == 3
    found = differ(free, base)
    assert (found.any, found.groups, found.protected_tags) == (True, (), ((), ("freeze", "gpu-*")))


@pytest.mark.parametrize("value", ['"freeze"', "[]", "[1]", '[""]'])
def test_protected_tags_are_a_list_of_texts(tmp_path: Path, value: str) -> None:
    path = write(tmp_path, FREEZE.format(protected=f"protected_tags = {value}"))
    with pytest.raises(PolicyError, match=r"site\.toml:5"):
        load(path)


def test_check_says_that_a_tag_which_everybody_may_remove_binds_nobody(tmp_path: Path) -> None:
    (note,) = check_file(write(tmp_path, FREEZE.format(protected="")))
    assert (note.code, note.rule) == ("tag-not-protected", "frozen")
    assert "everybody who may change the VM may set or remove" in note.message
    assert note.remedy == 'If the rule is to bind them: protected_tags = ["freeze"] under [policy].'
    assert check_file(write(tmp_path, FREEZE.format(protected=PROTECTED))) == ()
    without = FREEZE.replace('tags = ["freeze"]', 'tags = ["!thawed"]').format(protected=PROTECTED)
    (note,) = check_file(write(tmp_path, without))
    assert note.remedy == 'If the rule is to bind them: protected_tags = ["thawed"] under [policy].'


def test_check_warns_of_a_rule_that_binds_members_and_leaves_project_admins_out(tmp_path: Path) -> None:
    text = FREEZE.format(protected=PROTECTED).replace('["*", "!admin"]', '["member", "reader"]')
    (warning,) = check_file(write(tmp_path, text))
    assert (warning.code, warning.remedy) == ("role-left-out", 'Name who may: roles = ["*", "!admin"].')


def test_explanations_say_what_only_an_admin_can_lift(site: CompiledPolicy) -> None:
    stop = Submission(request_id="r1", operation=Operation.STOP, requested_by="ann")
    frozen = instance(VmState.ACTIVE, tags=("freeze",))
    (untagged,) = (way for way in ways(frozen, stop, site, 0) if way.turn is Turn.WITHOUT_TAG)
    assert untagged.text == "if it has no tag 'freeze', which only an admin may set or remove"
    for role, text in ((Role.MEMBER, "if it is unlocked"), (Role.ADMIN, "if it is unlocked by an admin")):
        locked = instance(VmState.ACTIVE, locked_by="somebody", lock_role=role)
        assert text in [way.text for way in ways(locked, stop, site, 0)]
