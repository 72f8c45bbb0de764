"""An agent of a server with TLS and a certificate of its own: connection and files."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import ssl
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
from websockets.exceptions import InvalidStatus
from websockets.sync.client import connect

from hosts.test_migration_tls import DAY_MS, authority
from hosts.test_migration_tls import certificate as certificate_of
from interlock.api.http.server_tls import server_tls
from interlock.config import Config, HostsConfig
from interlock.hypervisors.remote.reconnect import dial, tls_settings
from processes.real_agent import RealAgent
from processes.real_fleet import Fleet
from waiting import until

pytestmark = pytest.mark.qemu


@pytest.fixture
def certificate(tmp_path: Path) -> Path:
    return self_signed(tmp_path)


def self_signed(tmp_path: Path) -> Path:
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
    assert "with --ca" in failed[0]["why"]
    assert secure.server.get("/v1/hosts")["items"] == []


def test_a_certificate_that_was_replaced_is_used_after_a_reload(secure: Fleet, certificate: Path) -> None:
    url = secure.server.client.base_url
    before = ssl.get_server_certificate((url.host, url.port or 0))
    self_signed(certificate.parent)
    os.kill(json.loads((secure.server.folder / "server.json").read_text())["pid"], signal.SIGHUP)
    until(lambda: ssl.get_server_certificate((url.host, url.port or 0)) != before, "the old certificate is used")
    assert ssl.get_server_certificate((url.host, url.port or 0)) == certificate.read_text()


# -------------------------------------------------------------------------------------------- certificates of agents


@pytest.fixture
def strict(monkeypatch: pytest.MonkeyPatch) -> Iterator[Fleet]:
    """A server with a certificate of its own CA, which requires certificates of agents."""
    with tempfile.TemporaryDirectory(prefix="interlock-tls-", ignore_cleanup_errors=True) as name:
        folder = Path(name)
        folder.chmod(0o711)
        settings = {"INTERLOCK_TLS_NAMES": "127.0.0.1", "INTERLOCK_HOSTS_REQUIRE_CLIENT_CERTIFICATES": "true"}
        one = Fleet(folder, settings)
        monkeypatch.setenv("SSL_CERT_FILE", str(ca_of(one)))  # for the test's own client
        try:
            one.start()
            yield one
        finally:
            one.clear()


def ca_of(fleet: Fleet) -> Path:
    return fleet.server.folder / "tls" / "ca.pem"


def refusal(fleet: Fleet, token: Path, secret: str = "") -> str:
    """Why somebody is refused who connects as the agent of north, with its token and without its certificate."""
    tls = ssl.create_default_context(cafile=ca_of(fleet))
    headers = {"Authorization": f"Bearer {token.read_text()}"} | ({"Interlock-Enrolment": secret} if secret else {})
    url = f"{fleet.server.client.base_url}/v1/hosts/north"
    with pytest.raises(InvalidStatus) as refused:
        connect(f"{url.replace('https', 'wss')}/link", ssl=tls, additional_headers=headers)
    file = httpx.get(f"{url}/files/x", verify=tls, headers=headers)
    assert (refused.value.response.status_code, file.status_code) == (403, 403)
    assert "has sent no certificate" in file.json()["detail"]
    return str(json.loads(refused.value.response.body or b"")["detail"])


def enrol(fleet: Fleet) -> str:
    """A secret for north, which an admin created on the server's machine."""
    command = (sys.executable, "-m", "interlock", "host", "enroll", "north")
    environment = {**os.environ, **UNTRUSTED, "INTERLOCK_DATA_DIR": str(fleet.server.folder)}
    ran = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    assert "valid once, until" in ran.stderr
    return ran.stdout


def test_an_impostor_with_the_token_of_a_host_and_without_its_certificate_is_refused(strict: Fleet) -> None:
    secret = strict.folder / "north.enrolment"
    options = ("--ca", str(ca_of(strict)), "--enrolment-file", str(secret))
    north = RealAgent(strict.server, "north", strict.folder / "north", options, UNTRUSTED)
    strict.agents["north"] = north
    assert "the agent of north has sent no certificate" in refusal(strict, north.token_file())
    secret.write_text(enrol(strict))
    used = secret.read_text()
    north.start()
    strict.until_linked("north")
    north.stop()
    north.start()  # with the same secret, which is not used again
    strict.until_linked("north")
    strict.create("one", "north")  # its image is a file over HTTP, with the certificate
    assert "the agent of north has sent no certificate" in refusal(strict, north.token)
    assert "was used, or has expired" in refusal(strict, north.token, used.strip())
    assert strict.server.get("/v1/hosts/north")["linked"]


async def test_an_agent_whose_certificate_has_expired_says_how_to_get_another(tmp_path: Path) -> None:
    folder, now_ms = tmp_path / "server", int(time.time() * 1000)
    north = certificate_of(authority(folder, now_ms - 31 * DAY_MS), "north", tmp_path / "north")
    config = Config(data_dir=str(folder), tls_names=("127.0.0.1",), hosts=HostsConfig(require_client_certificates=True))
    tls = server_tls(config, authority(folder, now_ms))
    server = await asyncio.start_server(lambda _, writer: writer.close(), "127.0.0.1", 0, ssl=tls)
    async with server:
        url = f"https://127.0.0.1:{server.sockets[0].getsockname()[1]}"
        settings = await tls_settings(url, folder / "tls" / "ca.pem", north.path)
        with pytest.raises(ConnectionError, match="interlock host enroll north"):
            await dial(url, "north", "token", settings)
