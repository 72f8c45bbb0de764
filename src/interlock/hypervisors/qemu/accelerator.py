"""What executes guests' code here: the host's processor through KVM where that works, else QEMU's own translation.

KVM counts as usable if /dev/kvm answers as it should and the guests' user may open it, by the device's own bits or
by being put into the group that it belongs to. Nothing is started here.
"""

from __future__ import annotations

import fcntl
import os
import stat
from pathlib import Path
from typing import Final

import msgspec

from interlock.core.errors import Unavailable
from interlock.hypervisors.qemu.process import Account
from interlock.hypervisors.qemu.settings import QemuSettings

DEVICE: Final = Path("/dev/kvm")
_GET_API_VERSION: Final = 0xAE00
"""KVM_GET_API_VERSION, and the only answer for which the interface is what its documentation says (kvm/api.rst)."""
_API_VERSION: Final = 12
_READ_AND_WRITE: Final = 0o6
_MODELS: Final = {"kvm": "host", "tcg": "kvm64"}


class Chosen(msgspec.Struct, frozen=True, kw_only=True):
    """What was decided for this host."""

    settings: QemuSettings
    """With an accelerator and a processor that QEMU knows."""
    account: Account | None
    """Whom QEMU runs as."""
    because: str
    """Why it is not KVM, for people; empty where it is."""


def choose(settings: QemuSettings, account: Account | None, device: Path = DEVICE) -> Chosen:
    """Decide by what the settings and the host say.

    Raises:
        Unavailable: the settings insist on KVM, and it cannot be used.
    """
    accelerator, because = "tcg", "the configuration says so"
    if settings.accelerator != "tcg":
        because = _trouble(device) or _closed_to(device, account)
        if settings.accelerator == "kvm" and because:
            raise Unavailable(
                f"Guests are to run with KVM, but {because}.",
                remedy="Put that right, or set accelerator to `auto`, which uses KVM where it works.",
            )
        accelerator = "tcg" if because else "kvm"
        if account is not None and accelerator == "kvm":
            account = _in_group_of(device, account)
    model = _MODELS[accelerator] if settings.cpu_model == "auto" else settings.cpu_model
    settled = msgspec.structs.replace(settings, accelerator=accelerator, cpu_model=model)
    return Chosen(settings=settled, account=account, because=because)


def _trouble(device: Path) -> str:
    """What is wrong with KVM on this host; empty if nothing."""
    try:
        descriptor = os.open(device, os.O_RDWR | os.O_CLOEXEC)
    except OSError as error:
        return f"{device} cannot be opened: {error.strerror}"
    try:
        version = fcntl.ioctl(descriptor, _GET_API_VERSION, 0)
    except OSError as error:
        return f"{device} does not answer as KVM does: {error.strerror}"
    finally:
        os.close(descriptor)
    return "" if version == _API_VERSION else f"{device} speaks version {version} of its interface, not {_API_VERSION}"


def _closed_to(device: Path, account: Account | None) -> str:
    """Why guests could not open what we can; empty if they can."""
    if account is None:
        return ""
    found = device.stat()
    by_itself = (found.st_uid == account.user_id and _allows(found.st_mode >> 6)) or _allows(found.st_mode)
    if by_itself or _by_group(found):
        return ""
    return f"the guests' user may not open {device} (mode {stat.filemode(found.st_mode)})"


def _by_group(found: os.stat_result) -> bool:
    """Whether membership of its group is enough; nobody is put into root's."""
    return found.st_gid != 0 and _allows(found.st_mode >> 3)


def _allows(bits: int) -> bool:
    return bits & _READ_AND_WRITE == _READ_AND_WRITE


def _in_group_of(device: Path, account: Account) -> Account:
    found = device.stat()
    needed = _by_group(found) and not _allows(found.st_mode)
    return msgspec.structs.replace(account, group_ids=(found.st_gid,)) if needed else account
