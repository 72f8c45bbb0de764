"""Print the bill of materials of a server as CycloneDX JSON: every locked package with its hashes and licence.

The packages, versions and hashes are those of packaging/requirements.lock; the licences come from the metadata of the
same packages in this environment. The same lock file and SOURCE_DATE_EPOCH give the same document.
"""

from __future__ import annotations

import importlib.metadata
import os
import re
import sys
import uuid
from datetime import UTC, datetime
from pathlib import Path
from typing import Final

from cyclonedx.contrib.license.factories import LicenseFactory
from cyclonedx.model import HashAlgorithm, HashType
from cyclonedx.model.bom import Bom, BomMetaData
from cyclonedx.model.component import Component, ComponentType
from cyclonedx.model.license import License
from cyclonedx.output.json import JsonV1Dot6
from packageurl import PackageURL

ROOT: Final = Path(__file__).parents[1]
LOCK: Final = ROOT / "packaging" / "requirements.lock"
_PACKAGE: Final = re.compile(r"^(?P<name>[\w.-]+)==(?P<version>[^\s;\\]+)", re.MULTILINE)
_ELSEWHERE: Final = " ; sys_platform == 'win32'"
"""What marks a package that a server, which runs on Linux, does not have."""
_HASH: Final = re.compile(r"--hash=sha256:([0-9a-f]{64})")
_CLASSIFIER: Final = "License :: "
_SENTENCE_MAX: Final = 64
"""Some packages have the whole text where the name of the licence belongs."""


def main() -> None:
    own = Component(
        name="interlock",
        version=importlib.metadata.version("interlock"),
        type=ComponentType.APPLICATION,
        bom_ref="interlock",
        licenses=_licences("interlock"),
    )
    locked = _locked(LOCK.read_text())
    bom = Bom(components=locked, metadata=BomMetaData(component=own))
    bom.register_dependency(own, locked)
    bom.serial_number = uuid.uuid5(uuid.NAMESPACE_URL, LOCK.read_text())
    bom.metadata.timestamp = datetime.fromtimestamp(int(os.environ.get("SOURCE_DATE_EPOCH", "0")), UTC)
    sys.stdout.write(JsonV1Dot6(bom).output_as_string(indent=2) + "\n")


def _locked(text: str) -> list[Component]:
    """Return a component for each package and version; a package may be locked once for each Python."""
    found = list(_PACKAGE.finditer(text))
    ends = [match.start() for match in found[1:]] + [len(text)]
    return [
        Component(
            name=match["name"],
            version=match["version"],
            type=ComponentType.LIBRARY,
            purl=PackageURL("pypi", name=match["name"], version=match["version"]),
            bom_ref=f"{match['name']}=={match['version']}",
            hashes=[
                HashType(alg=HashAlgorithm.SHA_256, content=digest) for digest in _HASH.findall(text, match.end(), end)
            ],
            licenses=_licences(match["name"]),
        )
        for match, end in zip(found, ends, strict=True)
        if not text.startswith(_ELSEWHERE, match.end())
    ]


def _licences(name: str) -> list[License]:
    """Return what the package says of its licence: an SPDX expression, a name, or the classifiers.

    Raises `SystemExit` for a package that says nothing: somebody has to look.
    """
    make, package = LicenseFactory(), importlib.metadata.metadata(name)
    if expression := "".join(package.get_all("License-Expression") or ()):
        return [make.make_from_string(expression)]
    stated = "".join(package.get_all("License") or ()).strip()
    if stated and len(stated) <= _SENTENCE_MAX and "\n" not in stated:
        return [make.make_from_string(stated)]
    classifiers = [line for line in package.get_all("Classifier") or () if line.startswith(_CLASSIFIER)]
    if not classifiers:
        raise SystemExit(f"{name} states no licence.")
    return [make.make_with_name(line.rpartition(" :: ")[2]) for line in classifiers]


if __name__ == "__main__":
    main()
