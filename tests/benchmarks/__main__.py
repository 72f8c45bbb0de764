"""`PYTHONPATH=tests python -m benchmarks`: prints what `interlock bench` prints, and the figures of single parts."""

from __future__ import annotations

import sys

from benchmarks import MEASURES
from interlock import bench

if __name__ == "__main__":
    sys.exit(bench.main(measures={**bench.MEASURES, **MEASURES}, program="benchmarks"))
