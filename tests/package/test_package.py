"""`make package`: the same files from the same sources, wherever they are built; and they are what is installed."""

from __future__ import annotations

import hashlib
import json
import os
import platform
import re
import signal
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest
from cyclonedx.schema import SchemaVersion
from cyclonedx.validation.json import JsonStrictValidator

import interlock
from built_package import EPOCH, copy_sources, make_package
from clean_environments import PROJECT, ROOT, make_environment, requirements

PACKAGING = ROOT / "packaging"
UNITS = ["interlock.service", "interlock-agent.service"]


def digests(folder: Path) -> dict[str, str]:
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(folder.iterdir())}


def test_one_version_is_stated_everywhere() -> None:
    [released, *_] = re.findall(r"^## (\d\S*)", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)
    assert PROJECT["version"] == interlock.__version__ == released


def test_two_builds_are_equal_to_the_byte(package: Path, tmp_path: Path) -> None:
    """Another folder, other times of the files, another umask and time zone, and files that git does not know."""
    other = copy_sources(tmp_path / "elsewhere" / "interlock")
    for path in other.rglob("*.py"):
        os.utime(path, (1, 1))
    (other / "notes.txt").write_text("Not part of it.")
    assert digests(make_package(other, umask=0o077, TZ="Pacific/Chatham")) == digests(package)
    listed = (package / "SHA256SUMS").read_text().splitlines()
    assert {line[66:]: line[:64] for line in listed} == {
        name: digest for name, digest in digests(package).items() if name != "SHA256SUMS"
    }


def test_the_wheel_has_every_module_and_data_file_and_nothing_else(package: Path) -> None:
    [wheel] = package.glob("*.whl")
    inside = {name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name}
    source = ROOT / "src"
    assert inside == {
        str(path.relative_to(source))
        for path in (source / "interlock").rglob("*")
        if path.is_file() and path.suffix != ".pyc"
    }


def test_the_bill_of_materials_has_every_locked_package_of_a_server_with_its_licence(package: Path) -> None:
    text = (package / "interlock.cdx.json").read_text()
    assert JsonStrictValidator(SchemaVersion.V1_6).validate_str(text) is None
    document = json.loads(text)
    listed = {f"{one['name']}=={one['version']}" for one in document["components"]}
    locked = re.findall(r"^([\w.-]+==[^\s;\\]+)(.*)", (package / "requirements.lock").read_text(), re.MULTILINE)
    assert listed == {name for name, marker in locked if "sys_platform == 'win32'" not in marker}
    assert all(one["licenses"] and one["hashes"] for one in document["components"])
    assert document["metadata"]["component"]["version"] == interlock.__version__
    assert not {"pytest", "mypy", "hypothesis"} & {one["name"] for one in document["components"]}


def test_the_source_distribution_builds_the_same_wheel(package: Path, tmp_path: Path) -> None:
    [archive], [wheel] = package.glob("*.tar.gz"), package.glob("*.whl")
    subprocess.run(["tar", "-xzf", archive, "-C", tmp_path], check=True)
    [sources] = tmp_path.iterdir()
    assert (sources / "tests" / "package" / "test_package.py").is_file()
    subprocess.run(
        [sys.executable, "-m", "hatchling", "build", "-t", "wheel"],
        cwd=sources,
        env={**os.environ, "SOURCE_DATE_EPOCH": EPOCH},
        check=True,
        capture_output=True,
    )
    assert digests(sources / "dist") == {wheel.name: digests(package)[wheel.name]}


def test_a_server_starts_from_the_wheel_and_ends(package: Path, tmp_path: Path) -> None:
    python = make_environment(tmp_path / "environment", requirements("server"), sources=None)
    [wheel] = package.glob("*.whl")
    install = ["-m", "pip", "--python", str(python), "install", "-qq", "--no-deps", "--no-index", str(wheel)]
    subprocess.run([sys.executable, *install], check=True)
    program = python.with_name("interlock")
    environment = {
        "PATH": "/usr/bin:/bin",
        "INTERLOCK_DATA_DIR": str(tmp_path / "data"),
        "INTERLOCK_LISTEN_PORT": "0",
        "INTERLOCK_HYPERVISOR": "simulated",
    }
    with subprocess.Popen([program, "serve"], env=environment, cwd="/", stderr=subprocess.PIPE, text=True) as server:
        assert server.stderr is not None
        assert any("serving" in line for line in server.stderr)
        listed = subprocess.run(
            [program, "vm", "list"], env=environment, cwd="/", capture_output=True, text=True, check=False
        )
        server.send_signal(signal.SIGTERM)
        server.stderr.read()
    assert (listed.returncode, listed.stderr[:7]) == (0, "No VMs.")
    assert server.returncode == 0


@pytest.mark.skipif(platform.machine() != "x86_64", reason="hadolint is installed on x86_64 only")
def test_the_containerfile_has_no_lint(tmp_path: Path) -> None:
    def lint(file: Path) -> str:
        program = Path(sys.executable).with_name("hadolint")
        return subprocess.run([program, file], capture_output=True, text=True, check=False).stdout

    wrong = tmp_path / "Containerfile"
    wrong.write_text((PACKAGING / "Containerfile").read_text().replace("--no-install-recommends ", ""))
    assert "DL3015" in lint(wrong)
    assert lint(PACKAGING / "Containerfile") == ""


@pytest.mark.parametrize("unit", UNITS)
def test_systemd_accepts_the_units(unit: str, tmp_path: Path) -> None:
    def verify(text: str) -> str:
        file = tmp_path / unit
        program = Path(sys.executable).with_name("interlock")
        file.write_text(text.replace("/opt/interlock/bin/interlock", str(program)))
        return subprocess.run(
            ["systemd-analyze", "verify", "--man=no", file], capture_output=True, text=True, check=False
        ).stderr

    text = (PACKAGING / unit).read_text()
    assert "KillMod" in verify(text.replace("KillMode=", "KillMod="))
    assert verify(text) == ""


@pytest.mark.parametrize("unit", UNITS)
def test_guests_outlive_a_restart_of_the_unit(unit: str) -> None:
    """Without the first a stop ends them; without the second one that is killed for want of memory ends them all."""
    lines = (PACKAGING / unit).read_text().splitlines()
    assert {"KillMode=process", "OOMPolicy=continue"} <= set(lines)


def test_the_locked_requirements_of_a_server_are_those_that_are_tested() -> None:
    def locked(path: Path) -> dict[str, str]:
        return dict(re.findall(r"^([a-z0-9.\[\]-]+)==(\S+)", path.read_text(), re.MULTILINE))

    server, everything = locked(PACKAGING / "requirements.lock"), locked(ROOT / "requirements.lock")
    assert {name.name.lower().replace(".", "-") for name in requirements("server")} <= {
        name.partition("[")[0].replace(".", "-") for name in server
    }
    assert server.items() <= everything.items()
    assert "pytest" not in server


def test_the_extras_are_in_the_metadata(package: Path) -> None:
    [wheel] = package.glob("*.whl")
    archive = zipfile.ZipFile(wheel)
    [name] = [name for name in archive.namelist() if name.endswith("/METADATA")]
    extras = re.findall(r"^Provides-Extra: (\S+)$", archive.read(name).decode(), re.MULTILINE)
    stated = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    assert sorted(extras) == sorted(stated)
