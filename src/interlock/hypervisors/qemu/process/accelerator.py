"""Selects the accelerator: KVM if it is usable on this host, else TCG.

KVM is usable if /dev/kvm has the expected API version and the guests' user may open it, by the mode of the device or as
a member of its group.
"""

from __future__ import annotations

import fcntl
import os
import stat
from pathlib import Path
from typing import Final

import msgspec

from interlock.confinement.sandbox import Account
from interlock.core.errors import Unavailable
from interlock.hypervisors.qemu.settings import QemuSettings

DEVICE: Final = Path("/dev/kvm")
_GET_API_VERSION: Final = 0xAE00
"""KVM_GET_API_VERSION, and its only answer for which the API is as documented (kvm/api.rst)."""
_API_VERSION: Final = 12
_READ_AND_WRITE: Final = 0o6
_MODELS: Final = {"kvm": "host", "tcg": "kvm64"}


class Chosen(msgspec.Struct, frozen=True, kw_only=True):
    """The accelerator of this host."""

    settings: QemuSettings
    """With accelerator and CPU model resolved."""
    account: Account | None
    """The account that QEMU runs as."""
    because: str
    """Why it is not KVM, for people; empty if it is."""


def choose(settings: QemuSettings, account: Account | None, device: Path = DEVICE) -> Chosen:
    """Resolve the accelerator and CPU model of the settings on this host.

    Raises:
        Unavailable: the settings require KVM, and it is not usable.
    """
    accelerator, because = "tcg", "accelerator is set to tcg"
    if settings.accelerator != "tcg":
        because = _kvm_error(device) or _not_permitted(device, account)
        if settings.accelerator == "kvm" and because:
            raise Unavailable(
                f"KVM is required by the configuration, but {because}.",
                remedy="Correct that, or set accelerator to `auto`, which uses KVM if it is usable.",
            )
        accelerator = "tcg" if because else "kvm"
        if account is not None and accelerator == "kvm":
            account = _in_group_of(device, account)
    model = _MODELS[accelerator] if settings.cpu_model == "auto" else settings.cpu_model
    settled = msgspec.structs.replace(settings, accelerator=accelerator, cpu_model=model)
    return Chosen(settings=settled, account=account, because=because)


def _kvm_error(device: Path) -> str:
    """Return what is wrong with KVM on this host; empty if nothing."""
    try:
        descriptor = os.open(device, os.O_RDWR | os.O_CLOEXEC)
    except OSError as error:
        return f"{device} cannot be opened: {error.strerror}"
    try:
        version = fcntl.ioctl(descriptor, _GET_API_VERSION, 0)
    except OSError as error:
        return f"{device} is not KVM: {error.strerror}"
    finally:
        os.close(descriptor)
    return "" if version == _API_VERSION else f"{device} has API version {version}, not {_API_VERSION}"


def _not_permitted(device: Path, account: Account | None) -> str:
    """Return why the guests' user may not open the device; empty if it may."""
    if account is None:
        return ""
    found = device.stat()
    by_itself = (found.st_uid == account.user_id and _allows(found.st_mode >> 6)) or _allows(found.st_mode)
    if by_itself or _by_group(found):
        return ""
    return f"the guests' user may not open {device} (mode {stat.filemode(found.st_mode)})"


def _by_group(found: os.stat_result) -> bool:
    """Whether its group may open it; guests are never members of group root."""
    return found.st_gid != 0 and _allows(found.st_mode >> 3)


def _allows(bits: int) -> bool:
    return bits & _READ_AND_WRITE == _READ_AND_WRITE


def _in_group_of(device: Path, account: Account) -> Account:
    found = device.stat()
    needed = _by_group(found) and not _allows(found.st_mode)
    return msgspec.structs.replace(account, group_ids=(found.st_gid,)) if needed else account
