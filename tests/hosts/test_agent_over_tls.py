"""An agent of a server with TLS and a certificate of its own: connection and files."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from processes.real_agent import RealAgent
from processes.real_fleet import Fleet

pytestmark = pytest.mark.qemu


@pytest.fixture
def certificate(tmp_path: Path) -> Path:
    path = tmp_path / "certificate.pem"
    request = "req -x509 -newkey ec -pkeyopt ec_paramgen_curve:prime256v1 -nodes -days 1 -subj /CN=interlock"
    names = ("-addext", "subjectAltName=IP:127.0.0.1")
    files = ("-keyout", str(tmp_path / "key.pem"), "-out", str(path))
    subprocess.run(("openssl", *request.split(), *names, *files), check=True, capture_output=True)
    return path


@pytest.fixture
def secure(certificate: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Fleet]:
    monkeypatch.setenv("SSL_CERT_FILE", str(certificate))  # for the test's own client
    with tempfile.TemporaryDirectory(prefix="interlock-tls-", ignore_cleanup_errors=True) as name:
        folder = Path(name)
        folder.chmod(0o711)
        settings = {
            "INTERLOCK_TLS_CERTIFICATE": str(certificate),
            "INTERLOCK_TLS_KEY": str(certificate.with_name("key.pem")),
        }
        one = Fleet(folder, settings)
        try:
            one.start()
            yield one
        finally:
            one.clear()


UNTRUSTED = {"SSL_CERT_FILE": "/dev/null"}


def test_an_agent_trusts_the_certificate_that_it_is_given_also_for_files(secure: Fleet, certificate: Path) -> None:
    north = secure.add("north", "--ca", str(certificate), settings=UNTRUSTED)
    secure.create("one", "north")
    assert len(list((north.folder / "images").iterdir())) == 1


def test_a_command_trusts_the_certificate_that_it_is_given_and_no_other(secure: Fleet, certificate: Path) -> None:
    token = (secure.server.folder / "admin.token").read_text().strip()
    url = str(secure.server.client.base_url)
    environment = {**os.environ, **UNTRUSTED, "INTERLOCK_URL": url, "INTERLOCK_TOKEN": token}
    command = (sys.executable, "-m", "interlock")
    ran = subprocess.run((*command, "vm", "list"), env=environment, capture_output=True, text=True, check=False)
    assert ran.returncode == 5
    assert "not trusted" in ran.stderr
    assert "--ca" in ran.stderr
    subprocess.run((*command, "--ca", str(certificate), "vm", "list"), env=environment, check=True)
    subprocess.run((*command, "vm", "list"), env={**environment, "INTERLOCK_CA": str(certificate)}, check=True)


def test_an_agent_connects_to_no_server_whose_certificate_it_does_not_trust(secure: Fleet) -> None:
    north = RealAgent(secure.server, "north", secure.folder / "north", settings=UNTRUSTED)
    secure.agents["north"] = north
    north.begin()
    while not (failed := north.logged("not connected")):
        assert not north.ended
        time.sleep(0.02)
    assert "certificate verify failed" in failed[0]["why"]
    assert secure.server.get("/v1/hosts")["items"] == []
