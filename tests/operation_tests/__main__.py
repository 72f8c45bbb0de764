"""Goes through every proof and prints the page that is drawn from it."""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from interlock.driver.operations import PERFORMS
from operation_tests.run import SCENARIOS, clear
from operation_tests.scenario import Scenario
from operation_tests.stage import Stage
from operation_tests.table import Proved, draw, prove_fully


def main() -> int:
    """Print docs/reference/operations.md, which takes some minutes; 1 if something is not as a scenario says."""
    parser = argparse.ArgumentParser(prog="python -m operation_tests", description=__doc__)
    parser.add_argument("--repeat", type=int, default=5, metavar="N", help="how often each is measured (default 5)")
    parser.add_argument("--jobs", type=int, default=2, metavar="N", help="how many are proved at a time (default 2)")
    parser.add_argument("--only", action="append", metavar="OPERATION", help="prove only this; may be repeated")
    options = parser.parse_args()
    chosen = [one for one in SCENARIOS if not options.only or one.operation.value in options.only]
    shares = [chosen[number :: options.jobs] for number in range(options.jobs)]
    with tempfile.TemporaryDirectory(prefix="interlock-proof-") as name, ThreadPoolExecutor(options.jobs) as pool:
        folder = Path(name)
        folder.chmod(0o711)  # QEMU runs as another user if we are root
        running = [
            pool.submit(_share, folder / str(number), share, options.repeat) for number, share in enumerate(shares)
        ]
        ended = [one.result() for one in running]
    proved = {id(one.scenario): one for share, _ in ended for one in share}
    sys.stdout.write(draw([proved[id(one)] for one in SCENARIOS if id(one) in proved], options.repeat, PERFORMS))
    wrong = [words for _, share in ended for words in share]
    sys.stderr.writelines(f"NOT PROVED: {words}\n" for words in wrong)
    return 1 if wrong else 0


def _share(folder: Path, scenarios: Sequence[Scenario], repeat: int) -> tuple[list[Proved], list[str]]:
    """Prove some scenarios on a stage of their own: what was proved, and what was not as it should be."""
    folder.mkdir(mode=0o711)
    stage = Stage(folder)
    stage.open()
    proved: list[Proved] = []
    wrong: list[str] = []
    try:
        for scenario in scenarios:
            sys.stderr.write(f"proving {scenario.operation.value} ...\n")
            try:
                proved.append(prove_fully(stage, scenario, repeat))
            except AssertionError as error:
                wrong.append(str(error))
                stage.server.kill()
                stage.server.start()
                clear(stage)
    finally:
        stage.close()
    return proved, wrong


if __name__ == "__main__":
    sys.exit(main())
