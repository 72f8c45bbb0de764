"""KVM is used where it works and the guests' user may open it; everything else is told in words."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from interlock.confinement.sandbox import Account
from interlock.core.errors import Unavailable
from interlock.hypervisors.qemu.process import accelerator
from interlock.hypervisors.qemu.settings import QemuSettings

NOBODY = Account(user_id=65534, group_id=65534)
VERSION = 12


def settings(wanted: str = "auto", cpu_model: str = "auto") -> QemuSettings:
    return QemuSettings(folder=Path("/unused"), accelerator=wanted, cpu_model=cpu_model)


@pytest.fixture
def device(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A file in the place of /dev/kvm that answers as KVM does."""
    path = tmp_path / "kvm"
    path.touch()
    path.chmod(0o666)
    monkeypatch.setattr("fcntl.ioctl", lambda _descriptor, request, _argument: VERSION if request == 0xAE00 else -1)
    return path


def test_kvm_is_used_where_it_works(device: Path) -> None:
    chosen = accelerator.choose(settings(), NOBODY, device)
    assert (chosen.settings.accelerator, chosen.settings.cpu_model, chosen.because) == ("kvm", "host", "")
    assert chosen.account == NOBODY


def test_a_processor_that_is_named_is_kept(device: Path) -> None:
    assert accelerator.choose(settings(cpu_model="qemu64"), None, device).settings.cpu_model == "qemu64"
    assert accelerator.choose(settings("tcg"), None, device).settings.cpu_model == "kvm64"


def test_no_kvm_is_tcg_with_the_reason(tmp_path: Path) -> None:
    chosen = accelerator.choose(settings(), NOBODY, tmp_path / "absent")
    assert (chosen.settings.accelerator, chosen.settings.cpu_model) == ("tcg", "kvm64")
    assert "No such file" in chosen.because
    (tmp_path / "kvm").touch()
    assert "is not KVM" in accelerator.choose(settings(), None, tmp_path / "kvm").because


def test_another_version_of_its_interface_is_not_used(device: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fcntl.ioctl", lambda *_: 11)
    assert "version 11" in accelerator.choose(settings(), None, device).because


def test_kvm_that_is_insisted_on_and_absent_is_unavailable(tmp_path: Path) -> None:
    with pytest.raises(Unavailable) as told:
        accelerator.choose(settings("kvm"), NOBODY, tmp_path / "absent")
    assert "auto" in str(told.value.remedy)


@pytest.mark.skipif(os.geteuid() != 0, reason="only root may give a file to another group")
def test_guests_join_the_group_of_the_device_and_never_that_of_root(device: Path) -> None:
    device.chmod(0o660)
    os.chown(device, 0, 0)
    assert "may not open" in accelerator.choose(settings(), NOBODY, device).because
    os.chown(device, 0, 1234)
    chosen = accelerator.choose(settings(), NOBODY, device)
    assert chosen.settings.accelerator == "kvm"
    assert chosen.account is not None
    assert chosen.account.group_ids == (1234,)
