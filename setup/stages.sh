#!/usr/bin/env bash
# Runs the stages of `make check`, `make test`, `make coverage` or `make test-long` one after the other, and says how long
# each took. The first that fails is the last that runs.
set -euo pipefail
cd "$(dirname "$0")/.."

tier=$1
workers=${2:-2}
bin=.venv/bin
unset PYTHONDONTWRITEBYTECODE
summary=''
unsteady=''

finish() {
    local code=$?
    printf '\nTime of each stage (%s):\n%b' "$tier" "$summary"
    ((code == 0)) || echo "The last of them failed."
    if ((code == 0)) && [[ $unsteady ]]; then printf 'Failed beside other tests, passed alone:\n%s\n' "$unsteady"; fi
}
trap finish EXIT

stage() {
    local name=$1 code=0 began ended
    shift
    echo "$name: $*"
    began=${EPOCHREALTIME/[.,]/}
    "$@" || code=$?
    ended=${EPOCHREALTIME/[.,]/}
    summary+=$(printf '%9.1f s  %s' "$(((ended - began) / 100000))e-1" "$name")'\n'
    return "$code"
}

# Tests of real guests under emulation depend on the machine: a few that fail beside others are run once more, alone. They
# are named at the end, since each is a race to be found, in the test or in the program.
tests() {
    local failed=.pytest_cache/v/cache/lastfailed code=0
    rm -f "$failed"
    "$bin/pytest" -n "$workers" --durations 20 "$@" || code=$?
    ((code == 1)) || return "$code"
    (($(grep -c '::' "$failed") <= 3)) || return 1
    unsteady=$(grep -o '"[^"]*::.*"' "$failed")
    printf '\nOnce more, alone:\n%s\n' "$unsteady"
    "$bin/pytest" --last-failed --last-failed-no-failures none "$@"
}

if [[ $tier != check ]]; then
    # In a fresh clone every worker would rewrite the assertions of every test; here it is done once, beside the types.
    "$bin/pytest" --collect-only -q >/dev/null 2>&1 &
fi
stage lint "$bin/ruff" check .
stage format "$bin/ruff" format --check .
stage types "$bin/mypy"
stage imports "$bin/lint-imports" --no-logo
wait
case $tier in
    check) ;;
    test) stage tests tests -m 'not long' ;;
    coverage)
        rm -rf build/coverage
        mkdir -p build/coverage
        stage tests "$bin/coverage" run -m pytest -n "$workers" --durations 20 -m 'not long'
        stage combine "$bin/coverage" combine --quiet
        stage html "$bin/coverage" html --quiet --directory build/coverage/html
        stage report "$bin/coverage" report
        ;;
    test-long) TEST_TIER=long stage tests tests ;;
esac
