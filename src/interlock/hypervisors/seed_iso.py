"""The disk on which a guest finds what it is told of itself: cloud-init's NoCloud data source, as an ISO 9660 image.

What goes into the files is here too. The same seed gives the same bytes, so that writing it again changes nothing.
The words are those of cloud-init's documentation, `reference/datasources/nocloud`.
"""

from __future__ import annotations

import io
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

from pycdlib import PyCdlib
from pycdlib.dates import DirectoryRecordDate, VolumeDescriptorDate

from interlock.core.errors import Invalid
from interlock.core.records import Seed
from interlock.hypervisors.durable_files import sync_folder, telling_of_full_disk

VOLUME_LABEL: Final = "cidata"
"""By which a guest recognises the disk."""
SEED_BYTES_MAX: Final = 1 << 20
"""The largest image that is written. What a user may send is limited to less before it comes here."""
_MODE: Final = 0o600
_FILE_MODE: Final = 0o100444
_BEGINNING: Final = (80, 1, 1, 0, 0, 0, 0)
"""When everything on the disk is said to have been made: 1980, the first year that all readers take."""
_NEVER: Final = b"0" * 16 + b"\0"
"""How a volume descriptor says that a time is not given (ECMA-119, 8.4.26.1)."""
_SECTOR_BYTES: Final = 2048
_PRIMARY_SECTOR: Final = 16
_JOLIET_SECTOR: Final = 17
_MODIFIED_AT: Final = 830
"""Where a volume descriptor says when it was last changed (ECMA-119, 8.4.27)."""


def write(path: Path, seed: Seed, instance_id: str) -> None:
    """Write the seed of an instance to `path`, where it is afterwards durably, whole or not at all. Blocks.

    Raises:
        Invalid: it would be larger than `SEED_BYTES_MAX`.
        StoreFull, StoreError: it could not be written.
    """
    image = build(seed, instance_id)
    # One worker at a time acts for an instance, so that the name needs to be nobody else's; a crash's rest is replaced.
    aside = path.with_name(f"{path.name}.half-made")
    with telling_of_full_disk(path.parent):
        try:
            descriptor = os.open(aside, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW | os.O_CLOEXEC, _MODE)
            with os.fdopen(descriptor, "wb") as file:
                file.write(image)
                file.flush()
                os.fsync(file.fileno())
            aside.replace(path)
            sync_folder(path.parent)
        finally:
            aside.unlink(missing_ok=True)


def build(seed: Seed, instance_id: str) -> bytes:
    """The image of a seed. Raises `Invalid` if it would be larger than `SEED_BYTES_MAX`."""
    disk = PyCdlib()
    # Both extensions, because each has readers that know only the one; without them no name may have a hyphen.
    disk.new(interchange_level=3, vol_ident=VOLUME_LABEL, joliet=3, rock_ridge="1.09")
    try:
        for number, (name, text) in enumerate(sorted(files(seed, instance_id).items())):
            content = text.encode()
            disk.add_fp(
                io.BytesIO(content),
                len(content),
                f"/FILE{number}.;1",
                rr_name=name,
                joliet_path=f"/{name}",
                file_mode=_FILE_MODE,
            )
        _forget_the_time(disk)
        out = io.BytesIO()
        disk.write_fp(out)
    finally:
        disk.close()
    if out.tell() > SEED_BYTES_MAX:
        raise Invalid(
            f"The seed of the instance would be {out.tell()} bytes; the limit is {SEED_BYTES_MAX}.",
            remedy="Have the user-data fetch what is large from elsewhere: `#include` and an address.",
        )
    return _without_time_of_writing(out.getvalue())


def files(seed: Seed, instance_id: str) -> dict[str, str]:
    """The files of a seed, by name."""
    # JSON is YAML, and quotes everything that a name or a key could be mistaken for.
    meta = {"instance-id": instance_id, "local-hostname": seed.hostname}
    if seed.ssh_keys:
        meta |= {"public-keys": list(seed.ssh_keys)}  # type: ignore[dict-item]
    found = {
        "meta-data": json.dumps(meta, indent=1) + "\n",
        "user-data": seed.user_data if seed.user_data is not None else _generated_user_data(seed),
    }
    # Told nothing, cloud-init has the first interface ask for its address. A configuration that says the same by a
    # pattern of names is taken for a name by those of its writers that know no patterns.
    return found if seed.network_config is None else {**found, "network-config": seed.network_config}


def _generated_user_data(seed: Seed) -> str:
    config: dict[str, Any] = {"hostname": seed.hostname}
    if seed.ssh_keys:
        config["ssh_authorized_keys"] = list(seed.ssh_keys)
    return "#cloud-config\n" + json.dumps(config, indent=1) + "\n"


def _forget_the_time(disk: PyCdlib) -> None:
    """The library notes when it was called, in many places, and takes no other time."""
    for descriptor in (disk.pvd, disk.joliet_vd):
        assert descriptor is not None, "both were asked for"
        descriptor.volume_creation_date, descriptor.volume_effective_date = _never(), _never()
        for record in _records(descriptor.root_dir_record):
            record.date = DirectoryRecordDate.from_fields(*_BEGINNING)
            if record.rock_ridge is not None:
                for entries in (record.rock_ridge.dr_entries, record.rock_ridge.ce_entries):
                    if entries is not None and entries.tf_record is not None:
                        _forget_times_of(entries.tf_record)


def _without_time_of_writing(image: bytes) -> bytes:
    """The library notes it in both volume descriptors while it writes."""
    forgotten = bytearray(image)
    for sector in (_PRIMARY_SECTOR, _JOLIET_SECTOR):
        start = sector * _SECTOR_BYTES + _MODIFIED_AT
        forgotten[start : start + len(_NEVER)] = _NEVER
    return bytes(forgotten)


def _never() -> VolumeDescriptorDate:
    date = VolumeDescriptorDate()
    date.new(0.0)
    return date


def _records(root: Any) -> Iterator[Any]:
    yield root
    yield from root.children


def _forget_times_of(times: Any) -> None:
    for name in ("creation_time", "access_time", "modification_time", "attribute_change_time"):
        if getattr(times, name) is not None:
            setattr(times, name, DirectoryRecordDate.from_fields(*_BEGINNING))
