#!/usr/bin/env bash
# Makes dist/: wheel, sdist, the locked requirements of a server and their bill of materials, Containerfile and systemd
# units, and the hashes of all. The same commit gives the same files, whenever and wherever they are built.
set -euo pipefail
cd "$(dirname "$0")/.."

out=${1:-dist}
SOURCE_DATE_EPOCH=${SOURCE_DATE_EPOCH:-$(git log -1 --format=%ct)}
export SOURCE_DATE_EPOCH

rm -rf "$out"
"${PYTHON:-.venv/bin/python}" -m hatchling build --directory "$out" >&2
cp packaging/* "$out"
"${PYTHON:-.venv/bin/python}" tools/bill_of_materials.py >"$out/interlock.cdx.json"
(cd "$out" && sha256sum -- * >SHA256SUMS && cat SHA256SUMS)
