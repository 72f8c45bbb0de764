"""The folder that hosts share: marked once, known by its marker, and refused where another one has its name."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from interlock.core.errors import InsufficientCapacity, OperationRejected, Unavailable
from interlock.core.records import SharedFolder
from interlock.core.resource_claims import shared_markers, shared_place
from interlock.images.shared_folder import MARKER, MarkedFolder, instance_place


def opened(folder: Path, kept: Path, reserved_gib: int = 0) -> MarkedFolder:
    marked = MarkedFolder(folder, kept, reserved_gib=reserved_gib)
    marked.open()
    return marked


def found(marked: MarkedFolder) -> SharedFolder:
    folder = asyncio.run(marked.folder())
    assert folder is not None
    return folder


@pytest.fixture
def shared(tmp_path: Path) -> Path:
    (tmp_path / "shared").mkdir()
    return tmp_path / "shared"


def test_servers_that_share_a_folder_know_it_by_one_marker(shared: Path, tmp_path: Path) -> None:
    one, other = opened(shared, tmp_path / "one.json"), opened(shared, tmp_path / "other.json")
    assert found(one) == found(other)
    assert found(opened(shared, tmp_path / "one.json")) == found(one)
    assert [place.name for place in shared.iterdir()] == [MARKER]
    assert instance_place(found(one), "vm") == shared / "instances" / "vm"


def test_each_folder_has_a_marker_of_its_own(shared: Path, tmp_path: Path) -> None:
    (tmp_path / "second").mkdir()
    first = found(opened(shared, tmp_path / "kept.json"))
    second = found(opened(tmp_path / "second", tmp_path / "kept.json"))
    assert first.id != second.id


def test_a_folder_that_was_marked_and_is_not_mounted_is_not_marked_again(shared: Path, tmp_path: Path) -> None:
    known = found(opened(shared, tmp_path / "kept.json"))
    shared.rename(tmp_path / "elsewhere")
    with pytest.raises(Unavailable, match="is not there"):
        found(opened(shared, tmp_path / "kept.json"))
    shared.mkdir()
    with pytest.raises(Unavailable, match="is not there"):
        found(opened(shared, tmp_path / "kept.json"))
    with pytest.raises(OperationRejected, match="is not there"):
        instance_place(known, "vm")
    assert list(shared.iterdir()) == []


def test_a_folder_in_which_vms_have_their_disks_is_not_marked_again_though_nobody_knows_its_marker(
    shared: Path, tmp_path: Path
) -> None:
    """An empty mount point, and a data folder from which the note was lost with it."""
    known = found(opened(shared, tmp_path / "kept.json"))
    for lost in (shared / MARKER, tmp_path / "kept.json"):
        lost.unlink()
    recorded = shared_markers({shared_place(known), "another /elsewhere"}, str(shared))
    assert recorded == {known.id}
    marked = MarkedFolder(shared, tmp_path / "kept.json", reserved_gib=0)
    marked.open(recorded)
    assert list(shared.iterdir()) == []
    with pytest.raises(Unavailable, match="is not there"):
        found(marked)
    (shared / MARKER).write_text("another\n")
    marked.open(recorded)
    with pytest.raises(Unavailable, match="is not there"):
        found(marked)
    (shared / MARKER).write_text(f"{known.id}\n")
    marked.open(recorded)
    assert found(marked) == known


def test_another_folder_of_the_same_name_is_not_used(shared: Path, tmp_path: Path) -> None:
    known = found(opened(shared, tmp_path / "kept.json"))
    (shared / MARKER).write_text("another\n")
    with pytest.raises(Unavailable, match="Another folder"):
        found(opened(shared, tmp_path / "kept.json"))
    with pytest.raises(OperationRejected, match="is not the one"):
        instance_place(known, "vm")


def test_a_folder_that_is_not_there_at_first_is_found_later(shared: Path, tmp_path: Path) -> None:
    missing = tmp_path / "missing"
    with pytest.raises(Unavailable, match="is not there"):
        found(opened(missing, tmp_path / "kept.json"))
    assert not missing.exists()
    shared.rename(missing)
    assert found(opened(missing, tmp_path / "kept.json")).path == str(missing)


def test_nothing_is_put_into_a_folder_that_is_as_good_as_full(shared: Path, tmp_path: Path) -> None:
    with pytest.raises(InsufficientCapacity, match="No space left"):
        found(opened(shared, tmp_path / "kept.json", reserved_gib=1 << 40))


def test_who_shares_nothing_has_none() -> None:
    marked = MarkedFolder(None, Path("/nowhere"), reserved_gib=0)
    marked.open()
    assert asyncio.run(marked.folder()) is None
