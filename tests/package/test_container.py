"""The Containerfile works: its instructions are carried out in a bare Debian, and a server starts there and runs a VM.

There is no container daemon where the tests run. A root file system made by debootstrap stands for the base image, and
namespaces for mounts and processes for the container.
"""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import signal
import ssl
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from boot_sector import boot_sector
from clean_environments import ROOT

CONTAINERFILE = ROOT / "packaging" / "Containerfile"
SUITES = {"12": "bookworm", "13": "trixie"}
MIRROR = "http://deb.debian.org/debian"

pytestmark = [
    pytest.mark.long,
    pytest.mark.timeout(1800),
    pytest.mark.skipif(os.geteuid() != 0, reason="debootstrap and chroot need root"),
]


def instructions(text: str) -> Iterator[tuple[str, str]]:
    """The instructions of a Containerfile: a word in capitals, and the rest without line continuations."""
    code = "\n".join(line for line in text.splitlines() if not line.startswith("#"))
    for line in code.replace("\\\n", " ").splitlines():
        if line.strip():
            word, _, rest = line.partition(" ")
            yield word, rest.strip()


class Root:
    """A root file system, and the environment of what runs in it."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.environment = {"PATH": "/usr/sbin:/usr/bin:/sbin:/bin"}
        self.command: list[str] = []

    def build(self, context: Path) -> None:
        """Carry out the Containerfile. What it builds may use the network as this machine does."""
        for word, rest in instructions(CONTAINERFILE.read_text()):
            match word:
                case "FROM":
                    [version] = re.findall(r"debian:(\d+)-slim", rest)
                    command = ["debootstrap", "--variant=minbase", SUITES[version], str(self.folder), MIRROR]
                    subprocess.run(command, check=True, env={**os.environ, "PATH": f"{os.environ['PATH']}:/usr/sbin"})
                    shutil.copy("/etc/resolv.conf", self.folder / "etc" / "resolv.conf")
                    shutil.copy(ssl.get_default_verify_paths().cafile or "", self.folder / "certificates.pem")
                case "COPY":
                    *patterns, target = rest.split()
                    (self.folder / target.lstrip("/")).mkdir(parents=True)
                    for path in (path for pattern in patterns for path in context.glob(pattern)):
                        shutil.copy(path, self.folder / target.lstrip("/"))
                case "RUN":
                    allowed = {name: value for name, value in os.environ.items() if "proxy" in name.lower()}
                    command = self.wrapped(["/bin/sh", "-c", rest])
                    environment = {**self.environment, **allowed, "PIP_CERT": "/certificates.pem"}
                    subprocess.run(command, env=environment, check=True)
                case "ENV":
                    self.environment |= dict(pair.split("=", 1) for pair in shlex.split(rest))
                case "CMD":
                    self.command = json.loads(rest)
                case "VOLUME" | "EXPOSE":
                    pass
                case _:
                    raise AssertionError(f"{word}: carry this out too.")

    def wrapped(self, command: list[str]) -> list[str]:
        """A command that runs it in the root file system; its processes end with it."""
        namespaces = ["unshare", "--mount", "--pid", "--fork", "--kill-child", f"--mount-proc={self.folder}/proc"]
        return [*namespaces, "chroot", str(self.folder), *command]


def test_a_server_starts_in_the_container_and_boots_a_vm(package: Path, tmp_path: Path) -> None:
    root = Root(tmp_path / "root")
    root.build(package)
    (root.folder / "disk.img").write_bytes(boot_sector("hello from the container").ljust(1 << 20, b"\0"))
    environment = {**root.environment, "INTERLOCK_LISTEN_PORT": "0", "INTERLOCK_ACCELERATOR": "tcg"}

    def interlock(*words: str) -> str:
        command = ["chroot", str(root.folder), "interlock", *words]
        return subprocess.run(command, env=environment, check=True, capture_output=True, text=True).stdout

    command = root.wrapped(root.command)
    with subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True) as server:
        try:
            assert server.stderr is not None
            assert any("serving" in line for line in server.stderr)
            interlock("image", "add", "disk", "--disk", "/disk.img", "--format", "raw")
            interlock("vm", "create", "one", "--image", "disk", "--memory", "64MiB", "--wait")
            assert json.loads(interlock("vm", "show", "one", "--json"))["vm_state"] == "active"
        finally:
            server.send_signal(signal.SIGKILL)
