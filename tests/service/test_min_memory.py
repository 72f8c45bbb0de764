"""An image says with how much memory it boots at least; what would have less is refused in words."""

from __future__ import annotations

import pytest

from interlock.core.errors import Invalid
from interlock.core.operations import Operation
from interlock.core.preconditions import unmet
from interlock.core.records import NO_FACTS, Facts, Image, Instance, Spec
from interlock.service.reference_resolver import check_memory

IMAGE = Image(id="i", name="small", kind="disk", path="/i", size_bytes=1, sha256="", min_memory_mib=96)


def instance(memory_mib: int) -> Instance:
    return Instance(
        id="a", name="web", project="p", host="h", created_at_ms=0, updated_at_ms=0,
        spec=Spec(image=IMAGE, memory_mib=memory_mib),
    )  # fmt: skip


def test_less_than_the_image_needs_is_refused_and_the_least_is_taken() -> None:
    with pytest.raises(Invalid, match="64 is too little for the image small, which needs at least 96 MiB"):
        check_memory(IMAGE, 64)
    check_memory(IMAGE, 96)


def test_a_resize_never_goes_below_it() -> None:
    found = unmet(instance(128), Operation.RESIZE, {"memory_mib": 95}, NO_FACTS)
    assert found is not None
    assert found.because == "95 MiB of memory are too little: the image of web needs at least 96 MiB to boot."
    assert unmet(instance(128), Operation.RESIZE, {"memory_mib": 96}, NO_FACTS) is None


@pytest.mark.parametrize("operation", [Operation.REBUILD, Operation.RESCUE])
def test_neither_does_another_image(operation: Operation) -> None:
    found = unmet(instance(64), operation, {"image": "i"}, Facts(image=IMAGE))
    assert found is not None
    assert found.because == "web has 64 MiB of memory, and the image small needs at least 96 MiB to boot."
    assert unmet(instance(96), operation, {"image": "i"}, Facts(image=IMAGE)) is None
