"""What an operator may set, where it is written, and what is said of a mistake."""

from __future__ import annotations

from pathlib import Path

import msgspec
import pytest

from interlock.config import Config, QemuConfig
from interlock.config_file import load, unknown_variables
from interlock.core.errors import Invalid
from interlock.hypervisors.qemu.adapter import QemuHypervisor
from interlock.hypervisors.qemu.settings import QemuSettings
from interlock.server import Server
from interlock.service.server_log import warn_of_variables
from reference_pages import configuration_page

_NUMBERS = ("_timeout_ms", "_max", "_interval_ms", "_ms", "_mib")


def test_every_number_of_the_qemu_adapter_is_in_the_reference() -> None:
    page = configuration_page()
    numbers = [field.name for field in msgspec.structs.fields(QemuSettings) if field.name.endswith(_NUMBERS)]
    assert numbers
    missing = [name for name in numbers if f"| `{name}` | `INTERLOCK_" not in page]
    assert not missing, f"these belong in config.QemuConfig, which QemuSettings extends: {missing}"


def test_every_key_of_every_table_is_in_the_reference() -> None:
    page = configuration_page()
    tables = [field for field in msgspec.structs.fields(Config) if isinstance(field.default, msgspec.Struct)]
    for table in tables:
        keys = [field.name for field in msgspec.structs.fields(type(table.default))]
        missing = [key for key in keys if f"`INTERLOCK_{table.name.upper()}_{key.upper()}`" not in page]
        assert keys
        assert not missing, f"[{table.name}] in tools/reference_pages.py"


@pytest.mark.parametrize(
    "text", ['[hosts]\nshared_dir = "srv/shared"', 'hypervisor = "simulated"\n[hosts]\nshared_dir = "/srv/shared"']
)
def test_a_folder_that_hosts_cannot_share_is_refused(tmp_path: Path, text: str) -> None:
    file = tmp_path / "interlock.toml"
    file.write_text(text)
    with pytest.raises(Invalid, match=r"hosts\.shared_dir"):
        load(file, {})


def test_every_number_of_the_qemu_table_names_its_unit() -> None:
    page = configuration_page()
    for field in msgspec.structs.fields(QemuConfig):
        row = next(line for line in page.splitlines() if line.startswith(f"| `{field.name}` | `INTERLOCK_QEMU_"))
        if field.name.endswith(("_ms", "_mib")):
            assert f"in {'ms' if field.name.endswith('_ms') else 'MiB'}" in row, row


def test_what_is_set_of_qemu_reaches_the_adapter(tmp_path: Path) -> None:
    file = tmp_path / "interlock.toml"
    file.write_text('qemu_binary = "my-qemu"\n[qemu]\nstart_timeout_ms = 1234\n')
    environment = {"INTERLOCK_QEMU_KILL_TIMEOUT_MS": "77", "INTERLOCK_DATA_DIR": str(tmp_path)}
    server = Server(load(file, environment))
    assert isinstance(server.hypervisor, QemuHypervisor)
    settings = server.hypervisor.registry.settings
    assert (settings.start_timeout_ms, settings.kill_timeout_ms, settings.qemu_binary) == (1234, 77, "my-qemu")
    assert settings.qmp_timeout_ms == Config().qmp_timeout_ms


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("[qemu]\nstart_timout_ms = 5\n", "did you mean `start_timeout_ms`"),
        ("[qemu]\nstart_timeout_ms = 0\n", "qemu.start_timeout_ms is 0"),
        ("[upkeep]\nreclaim_after_ms = -1\n", "upkeep.reclaim_after_ms is -1; it must be 0 or more"),
        ("host_vcpus_overcommit = 0\n", "host_vcpus_overcommit is 0"),
        ('listen_host = "10.0.0.1"\n', "10.0.0.1 is not a loopback address"),
        ('tls_key = "key.pem"\n', "only one of tls_certificate and tls_key"),
        ('tls_key = "k"\ntls_certificate = "c"\ntls_names = ["a"]\n', "both tls_certificate and tls_names"),
        (
            "[hosts]\nrequire_client_certificates = true\n",
            "require_client_certificates is set, and the server has no TLS",
        ),
        ("host_disk_overcommit = nan\n", "host_disk_overcommit is nan"),
        ("host_memory_mib = -5\n", "host_memory_mib is -5"),
        ("[qemu]\nio_weight = 0\n", "qemu.io_weight is 0; a weight is 1 to 10000"),
        ("[qemu]\nusers_first = 1000\n", "user ids of VMs are 65536 to"),
    ],
)
def test_a_mistake_is_refused_with_its_place(tmp_path: Path, text: str, complaint: str) -> None:
    file = tmp_path / "interlock.toml"
    file.write_text(text)
    with pytest.raises(Invalid) as refusal:
        load(file, {})
    assert complaint in refusal.value.message


def test_an_unknown_variable_is_named_with_the_nearest() -> None:
    environment = {
        "INTERLOCK_QEMU_START_TIMOUT_MS": "1",
        "INTERLOCK_DATA_DIR": "/nowhere",
        "INTERLOCK_TOKEN": "x",
        "PATH": "/bin",
    }
    assert unknown_variables(environment) == {"INTERLOCK_QEMU_START_TIMOUT_MS": "INTERLOCK_QEMU_START_TIMEOUT_MS"}


def test_an_unknown_variable_is_warned_of_in_the_log(capsys: pytest.CaptureFixture[str]) -> None:
    warn_of_variables({"INTERLOCK_DATADIR": "/nowhere"})
    said = capsys.readouterr().out
    assert "INTERLOCK_DATADIR" in said
    assert "INTERLOCK_DATA_DIR" in said
