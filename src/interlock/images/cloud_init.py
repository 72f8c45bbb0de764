"""cloud-init's NoCloud seed: an ISO 9660 image with meta-data, user-data and network configuration.

Reproducible: the same seed gives the same bytes. See cloud-init's documentation, `reference/datasources/nocloud`.
"""

from __future__ import annotations

import io
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

from pycdlib import PyCdlib
from pycdlib.dates import DirectoryRecordDate, VolumeDescriptorDate

from interlock.core.errors import Invalid
from interlock.core.records import Seed
from interlock.images.atomic_files import disk_errors_raised, sync_folder, write_atomically

VOLUME_LABEL: Final = "cidata"
"""The label by which cloud-init finds the disk."""
SEED_BYTES_MAX: Final = 1 << 20
"""Maximum size of the image; requests are limited to less."""
_MODE: Final = 0o600
_FILE_MODE: Final = 0o100444
_BEGINNING: Final = (80, 1, 1, 0, 0, 0, 0)
"""The timestamp of all files: 1980, the first year that all readers accept."""
_NEVER: Final = b"0" * 16 + b"\0"
"""An unset time in a volume descriptor (ECMA-119, 8.4.26.1)."""
_SECTOR_BYTES: Final = 2048
_PRIMARY_SECTOR: Final = 16
_JOLIET_SECTOR: Final = 17
_MODIFIED_AT: Final = 830
"""Offset of the modification time in a volume descriptor (ECMA-119, 8.4.27)."""


def write(path: Path, seed: Seed, instance_id: str) -> None:
    """Write the seed image of an instance to `path`, atomically and durably. Blocks.

    Raises:
        Invalid: it would be larger than `SEED_BYTES_MAX`.
        StoreFull, StoreError: it could not be written.
    """
    image = build(seed, instance_id)
    with disk_errors_raised(path.parent):
        write_atomically(path, image, mode=_MODE)
        sync_folder(path.parent)


def build(seed: Seed, instance_id: str) -> bytes:
    """Return the image of a seed. Raises `Invalid` if it would be larger than `SEED_BYTES_MAX`."""
    disk = PyCdlib()
    # Both extensions, because some readers know only one; without them no name may have a hyphen.
    disk.new(interchange_level=3, vol_ident=VOLUME_LABEL, joliet=3, rock_ridge="1.09")
    try:
        for number, (name, content) in enumerate(sorted(files(seed, instance_id).items())):
            disk.add_fp(
                io.BytesIO(content),
                len(content),
                f"/FILE{number}.;1",
                rr_name=name,
                joliet_path=f"/{name}",
                file_mode=_FILE_MODE,
            )
        _reset_times(disk)
        out = io.BytesIO()
        disk.write_fp(out)
    finally:
        disk.close()
    image = out.getvalue()
    if len(image) > SEED_BYTES_MAX:
        raise Invalid(
            f"The seed of the instance would be {len(image)} bytes; the limit is {SEED_BYTES_MAX}.",
            remedy="Serve large user-data at a URL and refer to it with `#include`.",
        )
    return _without_write_times(image)


def files(seed: Seed, instance_id: str) -> dict[str, bytes]:
    """Return the files of a seed by name."""
    # JSON is valid YAML with everything quoted.
    meta = {"instance-id": instance_id, "local-hostname": seed.hostname}
    if seed.ssh_keys:
        meta |= {"public-keys": list(seed.ssh_keys)}  # type: ignore[dict-item]
    found = {"meta-data": json.dumps(meta, indent=1).encode() + b"\n", "user-data": _user_data(seed)}
    # Without a configuration, cloud-init uses DHCP on the first interface. No explicit one, because some of its
    # renderers take a name pattern for a literal name.
    return found if seed.network_config is None else {**found, "network-config": seed.network_config.encode()}


def _user_data(seed: Seed) -> bytes:
    if seed.user_data_bytes is not None:
        return seed.user_data_bytes
    return (seed.user_data if seed.user_data is not None else _generated_user_data(seed)).encode()


def _generated_user_data(seed: Seed) -> str:
    config: dict[str, Any] = {"hostname": seed.hostname}
    if seed.ssh_keys:
        config["ssh_authorized_keys"] = list(seed.ssh_keys)
    return "#cloud-config\n" + json.dumps(config, indent=1) + "\n"


def _reset_times(disk: PyCdlib) -> None:
    """Reset the timestamps, which the library always sets to the present."""
    for descriptor in (disk.pvd, disk.joliet_vd):
        assert descriptor is not None, "both were requested"
        descriptor.volume_creation_date, descriptor.volume_effective_date = _never(), _never()
        for record in _records(descriptor.root_dir_record):
            record.date = DirectoryRecordDate.from_fields(*_BEGINNING)
            if record.rock_ridge is not None:
                for entries in (record.rock_ridge.dr_entries, record.rock_ridge.ce_entries):
                    if entries is not None and entries.tf_record is not None:
                        _reset_times_of(entries.tf_record)


def _without_write_times(image: bytes) -> bytes:
    """Reset the modification times, which the library sets in both volume descriptors while writing."""
    reset = bytearray(image)
    for sector in (_PRIMARY_SECTOR, _JOLIET_SECTOR):
        start = sector * _SECTOR_BYTES + _MODIFIED_AT
        reset[start : start + len(_NEVER)] = _NEVER
    return bytes(reset)


def _never() -> VolumeDescriptorDate:
    date = VolumeDescriptorDate()
    date.new(0.0)
    return date


def _records(root: Any) -> Iterator[Any]:
    yield root
    yield from root.children


def _reset_times_of(times: Any) -> None:
    for name in ("creation_time", "access_time", "modification_time", "attribute_change_time"):
        if getattr(times, name) is not None:
            setattr(times, name, DirectoryRecordDate.from_fields(*_BEGINNING))
