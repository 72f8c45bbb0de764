"""Rules of user networks that tests leave: those of data folders that were dropped while their guests ran."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from typing import Final

from interlock.hypervisors.qemu.process.process_scan import find_guests
from interlock.networks.connections import network_tag

_TABLE: Final = re.compile(r"^table inet (interlock_(\w{6})_user)$", re.MULTILINE)


def remove_leftover_rules() -> None:
    """Remove the rules of data folders of which no guest runs. They slow down each later change of rules."""
    nft = shutil.which("nft", path=f"{os.environ.get('PATH', os.defpath)}:/usr/sbin:/sbin")
    if nft is None or os.geteuid() != 0:
        return
    found = _TABLE.findall(subprocess.run([nft, "list", "tables"], capture_output=True, text=True, check=False).stdout)
    running = {network_tag(guest.folder.host_id) for guest in find_guests()} if found else set()
    for table in (name for name, tag in found if tag not in running):
        subprocess.run([nft, "delete", "table", "inet", table], capture_output=True, check=False)
