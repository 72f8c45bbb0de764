"""Runs `make package` on copies of the source tree."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

from clean_environments import ROOT

EPOCH = "1700000000"
NOT_SOURCES = shutil.ignore_patterns(".git", ".venv", "dist", "__pycache__", ".*_cache", ".hypothesis", "*.egg-info")


def make_package(sources: Path, umask: int = 0o022, **environment: str) -> Path:
    """Run setup/package.sh in a folder, and return its folder dist."""
    subprocess.run(
        ["setup/package.sh"],
        cwd=sources,
        env={**os.environ, "PYTHON": sys.executable, "SOURCE_DATE_EPOCH": EPOCH, **environment},
        umask=umask,
        check=True,
        capture_output=True,
    )
    return sources / "dist"


def copy_sources(folder: Path) -> Path:
    shutil.copytree(ROOT, folder, ignore=NOT_SOURCES)
    return folder
