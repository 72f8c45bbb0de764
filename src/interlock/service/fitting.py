"""Whether what is asked for makes sense for the instance as it is, apart from whether it is allowed now.

Pure, and called inside the decision. What makes sense by itself is judged in `wishes`, and what is allowed by the gate.
"""

from __future__ import annotations

from typing import Any

from interlock.core.errors import InUse, Invalid, NoRoom, NotFound
from interlock.core.operations import Operation
from interlock.core.records import Disposition, Instance, Redundant, Spec
from interlock.core.specs import INTERFACES_MAX

_GIB = 1 << 30


def check(instance: Instance, operation: Operation, parameters: dict[str, Any]) -> None:
    """Raise `Invalid`, `NotFound`, `InUse` or `NoRoom` for what could only fail."""
    spec = instance.spec
    if spec is None:
        return
    match operation:
        case Operation.RESIZE:
            _check_size(spec, parameters)
        case Operation.SNAPSHOT | Operation.BACKUP if spec.image.kind != "disk":
            raise Invalid(
                f"{instance.name} boots a kernel, and not from its disk: an image of that could not be booted.",
                remedy="Copy what is on the disk from inside the guest.",
            )
        case Operation.EVACUATE if spec.has_root and spec.shared is None and not parameters.get("from_image"):
            raise Invalid(
                f"The root disk of {instance.name} is on a disk of the host {instance.host}.",
                remedy="Ask with from_image: it then begins as its image again, and what was written to it is lost.",
            )
        case Operation.SWAP_VOLUME:
            _check_swap(instance, spec, parameters)
        case Operation.ATTACH_INTERFACE if len(_interfaces(instance, spec)) >= INTERFACES_MAX:
            raise NoRoom(
                f"{instance.name} has {INTERFACES_MAX} interfaces beyond its first, or soon will; more it cannot have.",
                needed={"interfaces": 1},
                free={"interfaces": 0},
                remedy="Detach one first.",
            )
        case Operation.DETACH_INTERFACE:
            if parameters["interface"] not in _interfaces(instance, spec):
                raise NotFound(
                    f"{instance.name} has no interface {parameters['interface'][:80]}.",
                    remedy=f"`interlock vm show {instance.name}` tells their ids.",
                )
        case _:
            pass


def _interfaces(instance: Instance, spec: Spec) -> set[str]:
    """The ids of the interfaces that the instance has, or will have once what is asked of it has been done."""
    asked = {one.id for one in (*instance.outstanding, *instance.held) if one.operation is Operation.ATTACH_INTERFACE}
    return asked | {one.id for one in spec.interfaces}


def check_same(instance: Instance, answer: Disposition, operation: Operation, parameters: dict[str, Any]) -> None:
    """Raise `InUse` where an earlier request is taken for what was asked, and would bring about something else.

    How hard it is to be done is the policy's to compare. Passwords are not kept, so that no two are known to be one.
    """
    earlier = answer.request if isinstance(answer, Redundant) else None
    if earlier is None or earlier.operation is not operation:
        return
    mine, theirs = _without_hard(parameters), _without_hard(earlier.parameters)
    if mine != theirs or operation is Operation.SET_PASSWORD:
        raise InUse(
            f"The {operation.value} {earlier.id} of {instance.name} has not ended, and asks for something else.",
            remedy="Ask again when it has ended.",
        )


def _without_hard(parameters: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in parameters.items() if name != "hard"}


def _check_size(spec: Spec, wanted: dict[str, Any]) -> None:
    if all(getattr(spec, name) == value for name, value in wanted.items()):
        raise Invalid("parameters of resize: it has that size already.")
    root_bytes = spec.root_gib * _GIB or (spec.image.size_bytes if spec.image.kind == "disk" else 0)
    if wanted.get("root_gib", spec.root_gib) * _GIB < root_bytes and "root_gib" in wanted:
        raise Invalid(
            f"parameters of resize: root_gib {wanted['root_gib']} is less than the root disk has "
            f"({root_bytes} bytes), and a disk never shrinks."
        )


def _check_swap(instance: Instance, spec: Spec, parameters: dict[str, Any]) -> None:
    if parameters["old"] == parameters["new"]:
        raise Invalid("parameters of swap_volume: old and new are the same volume.")
    attached = {disk.id for disk in spec.disks}
    if parameters["new"] in attached:
        raise InUse(f"{instance.name} has the new volume itself.", remedy="Detach it first, or name another.")
    coming = {one.parameters.get("volume") for one in instance.outstanding}
    coming |= {one.parameters.get("new") for one in instance.outstanding}
    if parameters["old"] not in attached | coming:
        raise NotFound(
            f"The old volume is not attached to {instance.name}.",
            remedy=f"`interlock vm show {instance.name}` tells which are; `interlock vm attach` attaches a volume.",
        )
