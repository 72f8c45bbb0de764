#!/usr/bin/env bash
# Resolves pyproject.toml, its development group and setup/build.in into requirements.lock: exact versions with
# hashes, one file for every supported Python. Versions that are locked already stay unless UPGRADE=1 is set.
set -euo pipefail
cd "$(dirname "$0")/.."

tools=.venv/lock-tools
if [[ ! -d $tools ]]; then
    .venv/bin/python -m pip install -qq --disable-pip-version-check --target "$tools" uv
fi
PYTHONPATH=$tools .venv/bin/python -m uv pip compile pyproject.toml setup/build.in --group dev \
    --universal --python-version 3.11 --generate-hashes --quiet ${UPGRADE:+--upgrade} \
    --custom-compile-command 'make lock' --output-file requirements.lock
