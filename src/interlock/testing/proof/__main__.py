"""Goes through every proof and prints the page that is drawn from it."""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path

from interlock.testing.proof.stage import Stage
from interlock.testing.proof.table import draw, run_all


def main() -> None:
    """Print docs/reference/operations.md; takes some minutes."""
    parser = argparse.ArgumentParser(prog="python -m interlock.testing.proof", description=__doc__)
    parser.add_argument("--repeat", type=int, default=5, metavar="N", help="how often each is measured (default 5)")
    repeat = parser.parse_args().repeat
    with tempfile.TemporaryDirectory(prefix="interlock-proof-") as name:
        folder = Path(name)
        folder.chmod(0o711)  # QEMU runs as another user if we are root
        stage = Stage(folder)
        stage.open()
        try:
            proved = run_all(stage, repeat, lambda what: print(f"proving {what} ...", file=sys.stderr, flush=True))  # noqa: T201
        finally:
            stage.close()
    sys.stdout.write(draw(proved, repeat, {}))


if __name__ == "__main__":
    main()
