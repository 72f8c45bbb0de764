"""Record what cloud-init itself makes of user-data, as the reference for `interlock.service.user_data`.

Run it where cloud-init and what it needs can be imported, as after `apt-get download cloud-init` and
`dpkg-deb -x cloud-init_*.deb FOLDER`:

    PYTHONPATH=FOLDER/usr/lib/python3/dist-packages python tests/service/record_cloud_init.py
"""

from __future__ import annotations

import base64
import bz2
import gzip
import json
import sys
from email.mime.multipart import MIMEMultipart
from email.mime.nonmultipart import MIMENonMultipart
from email.mime.text import MIMEText
from pathlib import Path
from types import SimpleNamespace

ANSWERS = Path(__file__).with_name("cloud_init_answers.json")


def _mime(*parts: tuple[str, str]) -> bytes:
    message = MIMEMultipart(boundary="==boundary==")
    for kind, text in parts:
        message.attach(MIMEText(text, kind.partition("/")[2]))
    return message.as_bytes()


def _mime_with_gzip(text: bytes) -> bytes:
    message = MIMEMultipart(boundary="==boundary==")
    part = MIMENonMultipart("application", "gzip")
    part.set_payload(base64.encodebytes(gzip.compress(text, mtime=0)).decode())
    part["Content-Transfer-Encoding"] = "base64"
    message.attach(part)
    return message.as_bytes()


CONFIG = b"#cloud-config\nhostname: a\n"
SCRIPT = b"#!/bin/sh\necho\n"
SAMPLES: dict[str, bytes] = {
    "config": CONFIG,
    "config after a line": b"\n" + CONFIG,
    "config after blanks": b" \t\r\n" + CONFIG,
    "config in capitals": b"#Cloud-Config\n{}\n",
    "config with more behind it": b"#cloud-configuration\n{}\n",
    "config without a hyphen": b"#cloudconfig\n{}\n",
    "config after a byte order mark": b"\xef\xbb\xbf" + CONFIG,
    "config after a comment": b"# mine\n" + CONFIG,
    "config in UTF-16": CONFIG.decode().encode("utf-16"),
    "config in Latin-1": CONFIG + b"# \xe4\n",
    "config with CRLF": CONFIG.replace(b"\n", b"\r\n"),
    "archive": b"#cloud-config-jsonp\n[]\n",
    "script": SCRIPT,
    "script after a line": b"\n" + SCRIPT,
    "boothook": b"#cloud-boothook\n#!/bin/sh\n",
    "part handler": b"#part-handler\n",
    "template": b"## template: jinja\n" + CONFIG,
    "template after a line": b"\n## template: jinja\n" + CONFIG,
    "template without a blank": b"##template: jinja\n" + CONFIG,
    "template of another kind": b"## template: cheetah\n" + CONFIG,
    "per boot": b"text/x-shellscript-per-boot\n",
    "text": b"hello\n",
    "json": b'{"ignition": {"version": "3.4.0"}}\n',
    "upstart": b"#upstart-job\n",
    "binary": bytes(range(256)),
    "gzip of a config": gzip.compress(CONFIG, mtime=0),
    "gzip of two members": gzip.compress(CONFIG, mtime=0) + gzip.compress(b"a: b\n", mtime=0),
    "gzip with padding": gzip.compress(CONFIG, mtime=0) + bytes(512),
    "gzip with a tail": gzip.compress(CONFIG, mtime=0) + b"tail",
    "gzip of a text": gzip.compress(b"hello\n", mtime=0),
    "gzip twice": gzip.compress(gzip.compress(CONFIG, mtime=0), mtime=0),
    "gzip cut short": gzip.compress(CONFIG, mtime=0)[:-9],
    "gzip of MIME": gzip.compress(_mime(("text/cloud-config", "a: b\n")), mtime=0),
    "bzip2": bz2.compress(CONFIG),
    "base64": base64.b64encode(CONFIG),
    "MIME": _mime(("text/cloud-config", "a: b\n"), ("text/x-shellscript", SCRIPT.decode())),
    "MIME with plain parts": _mime(("text/plain", CONFIG.decode()), ("text/plain", "hello\n")),
    "MIME with a script that is none": _mime(("text/x-shellscript", CONFIG.decode())),
    "MIME with an unknown type": _mime(("text/html", "<p>\n")),
    "MIME with gzip": _mime_with_gzip(CONFIG),
    "MIME with gzip of a text": _mime_with_gzip(b"hello\n"),
    "MIME without parts": b"MIME-Version: 1.0\nContent-Type: multipart/mixed; boundary=x\n\n--x--\n",
    "MIME without its version": b"Content-Type: text/cloud-config\n\na: b\n",
    "MIME of one part": b"Content-Type: text/cloud-config\nMIME-Version: 1.0\n\na: b\n",
    "MIME after a line": b"\nMIME-Version: 1.0\nContent-Type: text/cloud-config\n\na: b\n",
    "mentions MIME": CONFIG + b"# mime-version: none\n",
}


def main() -> None:
    """Write what cloud-init says of each sample: the types of the parts that it would hand to its handlers."""
    from cloudinit import user_data, version  # type: ignore[import-not-found, unused-ignore]

    paths = SimpleNamespace(get_ipath_cur=lambda _name: "/nonexistent", get_cpath=lambda _name: "/nonexistent")
    processor = user_data.UserDataProcessor.__new__(user_data.UserDataProcessor)
    processor.paths, processor.ssl_details = paths, {}
    answers = {}
    for name, data in SAMPLES.items():
        message = processor.process(data)
        answers[name] = [part.get_content_type() for part in message.walk() if not part.is_multipart()]
    told = {"cloud_init": version.version_string(), "answers": answers}
    ANSWERS.write_text(json.dumps(told, indent=1) + "\n")
    sys.stdout.write(f"{len(answers)} answers of cloud-init {told['cloud_init']}\n")


if __name__ == "__main__":
    main()
