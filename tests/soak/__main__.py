"""`PYTHONPATH=tests python -m soak`: prints what it did as JSON, and ends with 1 if anything was wrong.

Wrong is an acknowledged request that never ended, an instance that ran twice, a VM that can neither be reached nor
deleted, a damaged disk or one that has lost what was written on it, a port without its VM or a VM without its port,
and anything left over once all of it was deleted.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import signal
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Final

from soak.faults import Trouble
from soak.run import Soak

_FOLDER: Final = (
    "a new folder that is kept; by default one that is removed. What is in the server's data folder is kept only "
    "`--without full`"
)


def main() -> int:
    """Run one soak; 0 if nothing was wrong."""
    parser = argparse.ArgumentParser(prog="python -m soak", description=__doc__)
    parser.add_argument("--vms", type=int, default=20)
    parser.add_argument("--small", type=int, default=4, help="how many of them are a Linux that boots from its disk")
    parser.add_argument("--hosts", type=int, choices=(1, 2), default=2)
    parser.add_argument("--shared", action="store_true", help="have the disks of all VMs where both hosts reach them")
    parser.add_argument("--minutes", type=float, default=10.0)
    parser.add_argument("--callers", type=int, default=3)
    parser.add_argument("--kill-every", type=float, default=20.0, metavar="S", help="on average, in seconds")
    parser.add_argument(
        "--without", type=Trouble, choices=tuple(Trouble), nargs="+", default=(), help="troubles to go without"
    )
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--folder", type=Path, help=_FOLDER)
    options = parser.parse_args()
    signal.signal(signal.SIGTERM, _end)  # so that nothing is left running
    with _folder(options.folder) as folder:
        soak = Soak(
            folder,
            vms=options.vms,
            small=options.small,
            hosts=options.hosts,
            shared=options.shared,
            seed=options.seed,
            without=options.without,
        )
        try:
            soak.run(options.minutes * 60, options.callers, options.kill_every)
        finally:
            soak.close()
            json.dump(soak.report(), sys.stdout, indent=2, ensure_ascii=False)
            sys.stdout.write("\n")
    if soak.book.wrong:
        sys.stderr.write(f"{len(soak.book.wrong)} things are wrong; --seed {options.seed} draws the same again.\n")
    return 1 if soak.book.wrong else 0


def _end(_number: int, _frame: object) -> None:
    sys.exit(1)


@contextlib.contextmanager
def _folder(kept: Path | None) -> Iterator[Path]:
    """A folder that QEMU's user may pass through, which it is not if we are root."""
    if kept is not None:
        kept.mkdir(mode=0o711)
        yield kept.resolve()
        return
    with tempfile.TemporaryDirectory(prefix="interlock-soak-") as name:
        Path(name).chmod(0o711)
        yield Path(name)


if __name__ == "__main__":
    sys.exit(main())
