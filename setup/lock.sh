#!/usr/bin/env bash
# Resolves pyproject.toml with every extra, its development group and setup/build.in into requirements.lock, and what
# the extra `server` needs of that into packaging/requirements.lock: exact versions with hashes, one file for every
# supported Python. Versions that are locked already stay unless UPGRADE=1 is set.
set -euo pipefail
cd "$(dirname "$0")/.."

tools=.venv/lock-tools
if [[ ! -d $tools ]]; then
    .venv/bin/python -m pip install -qq --disable-pip-version-check --target "$tools" uv
fi
compile() {
    PYTHONPATH=$tools .venv/bin/python -m uv pip compile "$@" --universal --python-version 3.11 --generate-hashes --quiet \
        --custom-compile-command 'make lock'
}
compile pyproject.toml setup/build.in --all-extras --group dev ${UPGRADE:+--upgrade} --output-file requirements.lock
compile pyproject.toml --extra server --constraint requirements.lock --output-file packaging/requirements.lock
