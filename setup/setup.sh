#!/usr/bin/env bash
# Sets up what is missing, saying so first: a virtual environment from requirements.lock with Interlock in it, QEMU, and
# the package lists that the small guest is built from. What is there already costs a look and no more.
set -euo pipefail
cd "$(dirname "$0")/.."

readonly OLDEST="3.11"
readonly PROGRAMS=("qemu-system-x86_64:qemu-system-x86" "qemu-img:qemu-utils" "bwrap:bubblewrap"
    "passt:passt" "dnsmasq:dnsmasq-base" "nft:nftables"
    "dot:graphviz" "systemd-analyze:systemd" "debootstrap:debootstrap")
PATH=$PATH:/usr/sbin:/sbin
readonly STAMP=.venv/set-up

say() { echo "setup: $*"; }
fail() {
    echo "setup: $*" >&2
    exit 1
}

# ------------------------------------------------------------------------------------------------------------ apt

as_root=()
may_use_apt() {
    local wanted=$1
    command -v apt-get >/dev/null || fail "missing: $wanted. This is not Debian or Ubuntu; install that, then try again."
    [[ $EUID -eq 0 ]] && return
    command -v sudo >/dev/null || fail "missing: $wanted. As root, run: apt-get update && apt-get install -y $wanted"
    as_root=(sudo)
    # Where nobody can type a password, sudo must not wait for one.
    [[ -t 0 ]] || as_root=(sudo -n)
    "${as_root[@]}" true || fail "missing: $wanted. Run: sudo apt-get update && sudo apt-get install -y $wanted"
}

apt() {
    "${as_root[@]}" env DEBIAN_FRONTEND=noninteractive apt-get -q -o Dpkg::Use-Pty=0 -o Acquire::Retries=3 "$@" </dev/null
}

have_package_lists() { compgen -G '/var/lib/apt/lists/*_Packages*' >/dev/null; }

update_package_lists() {
    say "refreshing the lists of packages (apt-get update)"
    # One unreachable source of many is no reason to stop: what is needed may come from another.
    apt update || say "some lists could not be refreshed; going on with those there are"
}

install_packages() {
    may_use_apt "$*"
    say "installing by apt: $*"
    have_package_lists || update_package_lists
    # Lists that are too old name versions that the mirror no longer has.
    apt install -y --no-install-recommends "$@" && return
    update_package_lists
    apt install -y --no-install-recommends "$@" || fail "apt-get could not install: $*"
}

# --------------------------------------------------------------------------------------------------------- python

is_new_enough() {
    "$1" -c "import sys; sys.exit(sys.version_info < (${OLDEST/./, }))" >/dev/null 2>&1
}

find_python() {
    local candidate
    for candidate in "${PYTHON:-}" python3 python3.13 python3.12 python3.11 /usr/bin/python3; do
        if [[ -n $candidate ]] && command -v "$candidate" >/dev/null && is_new_enough "$candidate"; then
            command -v "$candidate"
            return
        fi
    done
    return 1
}

can_make_environments() { "$1" -c 'import ensurepip, venv' >/dev/null 2>&1; }

make_environment() {
    local python version
    if ! python=$(find_python); then
        say "there is no Python $OLDEST or newer yet"
        install_packages python3 python3-venv
        python=$(find_python) || fail "this system's Python is older than $OLDEST; install a newer one and set PYTHON to it"
    fi
    if ! can_make_environments "$python"; then
        version=$("$python" -c 'import sys; print("%d.%d" % sys.version_info[:2])')
        say "$python cannot make virtual environments yet"
        install_packages "python$version-venv"
    fi
    say "making the virtual environment .venv with $("$python" --version)"
    rm -rf .venv
    "$python" -m venv .venv
}

environment_works() { [[ -x .venv/bin/python ]] && .venv/bin/python -m pip --version >/dev/null 2>&1; }

# Pip's output as one line that goes on, or as a line now and then where there is no terminal.
show_progress() {
    local line seen=0 total
    total=$(grep -c '^[a-zA-Z0-9].*==' requirements.lock)
    while IFS= read -r line; do
        case $line in
            Collecting*)
                seen=$((seen + 1))
                if [[ -t 1 ]]; then
                    printf '\rsetup: fetching package %d of at most %d  ' "$seen" "$total"
                elif ((seen % 20 == 0)); then
                    say "fetching package $seen of at most $total"
                fi
                ;;
            Installing*)
                [[ ! -t 1 ]] || echo
                say "installing $seen packages; this can take a minute or two"
                ;;
        esac
    done
}

install_project() {
    environment_works || make_environment
    say "installing what requirements.lock lists, and Interlock, into .venv"
    rm -f "$STAMP"
    local pip=(.venv/bin/python -m pip install --disable-pip-version-check --no-input)
    "${pip[@]}" --progress-bar off --require-hashes --only-binary :all: -r requirements.lock 2>&1 |
        tee .venv/pip.log | show_progress || {
        tail -n 40 .venv/pip.log >&2
        fail "pip could not install what requirements.lock lists; what it said is above"
    }
    "${pip[@]}" -qq --no-deps --no-build-isolation --editable .
    state >"$STAMP"
}

# What an environment was set up from, and where: one that was moved or copied is made anew.
state() {
    pwd
    cat requirements.lock pyproject.toml setup/setup.sh | sha256sum
}

is_set_up() {
    [[ -x .venv/bin/interlock && -f $STAMP ]] && [[ $(state) == "$(<"$STAMP")" ]] && .venv/bin/python -c '' 2>/dev/null
}

# -------------------------------------------------------------------------------------------------------- programs

install_programs() {
    local pair missing=()
    # Where debootstrap is, though not for everybody.
    PATH=$PATH:/usr/sbin
    for pair in "${PROGRAMS[@]}"; do
        command -v "${pair%%:*}" >/dev/null || missing+=("${pair##*:}")
    done
    if ((${#missing[@]})); then
        install_packages "${missing[@]}"
    fi
}

refresh_lists_for_the_small_guest() {
    command -v apt-get >/dev/null || return 0
    have_package_lists && return
    may_use_apt "the lists of packages, which the small guest is built from"
    update_package_lists
}

is_set_up || install_project
install_programs
refresh_lists_for_the_small_guest
