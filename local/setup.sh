# shellcheck shell=bash
# Sourced by the programs beside it. Sourcing it removes the user's own settings and sets ROOT, VENV and TOOLS.
# `arguments` answers `--help` and wrong arguments at once; `set_up` then installs all dependencies. Runs on Bash 3.2, which macOS has.

ROOT=$(CDPATH='' cd -P -- "$(dirname -- "${BASH_SOURCE[0]}")/.." && pwd)
LOCAL=$ROOT/target/local
VENV=$LOCAL/venv
TOOLS=$LOCAL/tools
SETUP_LOG=$LOCAL/setup.log

# Removes credentials above all: nothing here may ever talk to a real account or a real database. Of pip's settings, only those for reaching an
# index stay.
unset "${!AWS_@}" "${!PG@}" "${!SAM_CLI_@}" DATABASE_URL VIRTUAL_ENV
for name in "${!PYTHON@}" "${!PIP_@}"; do
    case $name in
    PYTHON | PIP_INDEX_URL | PIP_EXTRA_INDEX_URL | PIP_FIND_LINKS | PIP_NO_INDEX | PIP_TRUSTED_HOST | PIP_CERT | PIP_CLIENT_CERT | PIP_PROXY | \
        PIP_TIMEOUT | PIP_DEFAULT_TIMEOUT | PIP_RETRIES | PIP_CACHE_DIR | PIP_NO_CACHE_DIR | PIP_CONFIG_FILE | PIP_KEYRING_PROVIDER) ;;
    *) unset "$name" ;;
    esac
done
unset name
export AWS_CONFIG_FILE=/dev/null AWS_SHARED_CREDENTIALS_FILE=/dev/null AWS_EC2_METADATA_DISABLED=true SAM_CLI_TELEMETRY=0
# A user's pip.conf may request installs outside of the environment.
export PIP_USER=0 PIP_REQUIRE_VIRTUALENV=0 PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_NO_INPUT=1 PYTHONNOUSERSITE=1
# Our servers listen on loopback, which no proxy reaches.
no_proxy=localhost,127.0.0.1,::1${no_proxy:+,$no_proxy}
export no_proxy NO_PROXY=$no_proxy
export PYTHONPATH=$ROOT/local PYTHONUNBUFFERED=1

# Without a trap, Bash continues when a signal reaches only it, and not the program that it waits for.
end_on_signals() { trap 'exit 130' INT TERM HUP; }
end_on_signals

die() {
    printf '%s\n' "$@" >&2
    exit 1
}

# arguments PROGRAM ARGUMENT...: answers `--help` and rejects wrong arguments before anything is installed.
arguments() {
    local status=0
    # An older Python is enough here. If there is none, `set_up` explains what to do.
    find_python || PYTHON=$(command -v python3) || return 0
    PYTHONDONTWRITEBYTECODE=1 "$PYTHON" "$ROOT/local/world/arguments.py" "$@" || status=$?
    [ "$status" = "$ARGUMENTS_FIT" ] || exit "$status"
}
# The exit status of arguments.py if the arguments are right.
ARGUMENTS_FIT=3

# set_up: installs everything needed to build, deploy and run, and requirements/$ALSO.txt; quick once it is installed. LocalStack and ./world run
# in VENV. SAM CLI, cargo-lambda and the linters are in TOOLS, which comes first on PATH.
set_up() {
    # pip and uv leave files in the directory for temporary files.
    mkdir -p "$LOCAL/tmp"
    export TMPDIR=$LOCAL/tmp
    need_cargo
    say_disk_use
    need_build_tools
    need_python
    lock
    need_environment "$VENV" localstack "LocalStack"
    need_executor
    need_environment "$TOOLS" tools "SAM CLI, cargo-lambda and the linters"
    [ -z "${ALSO:-}" ] || need_environment "$LOCAL/$ALSO-venv" "$ALSO" "further packages for ./local/${0##*/}"
    unlock
    need_openssl
    find_zig
    move_in
    export PATH=$TOOLS/bin:$PATH
}

# Figures from x86_64 Linux: `du -sm` of target after ./local/demo, and after ./local/test.
say_disk_use() {
    [ ! -e "$VENV" ] || return 0
    printf '%s\n' "The first run downloads about 400 MB of Python packages and crates, and writes about 2 GB to target/; ./local/test needs 7 GB" \
        "there. Outside of it, only the caches of cargo and pip grow. ./local/clean deletes target/."
}

# Puts every program's home, cache and temporary files inside the checkout. Cargo's own homes stay, so that crates are shared.
move_in() {
    local home=${HOME:-/nonexistent} directory
    export CARGO_HOME=${CARGO_HOME:-$home/.cargo}
    [ ! -d "${RUSTUP_HOME:-$home/.rustup}" ] || export RUSTUP_HOME=${RUSTUP_HOME:-$home/.rustup}
    unset "${!XDG_@}"
    for directory in home cache; do mkdir -p "$LOCAL/$directory"; done
    export HOME=$LOCAL/home XDG_CACHE_HOME=$LOCAL/cache PYTHONPYCACHEPREFIX=$LOCAL/cache/python
    # Settings in the environment may make cargo write elsewhere.
    unset CARGO_BUILD_TARGET_DIR CARGO_BUILD_BUILD_DIR CARGO_BUILD_TARGET
    export CARGO_TARGET_DIR=$ROOT/target
    export CARGO_ZIGBUILD_CACHE_DIR ZIG_GLOBAL_CACHE_DIR=$LOCAL/cache/zig ZIG_LOCAL_CACHE_DIR=$LOCAL/cache/zig
    CARGO_ZIGBUILD_CACHE_DIR=$(place_of_compilers)
}

# OpenSSL's makefile fails if the compiler's path has a space, and cargo-lambda puts its compiler in this cache.
place_of_compilers() {
    local place
    for place in "$LOCAL/cache" "$CARGO_HOME"; do
        case $place in *[[:space:]]*) ;; *) printf '%s\n' "$place/zigbuild" && return ;; esac
    done
    die "OpenSSL cannot be built, because the paths of both the checkout ($ROOT) and cargo ($CARGO_HOME) have a space: move one, or set CARGO_HOME."
}

# Without these variables cargo-lambda starts Python to start zig, for each of OpenSSL's thousand files. The Python path is wrong on purpose.
find_zig() {
    local zig
    for zig in "$TOOLS"/lib/python3*/site-packages/ziglang/zig; do
        [ ! -x "$zig" ] || export CARGO_ZIGBUILD_ZIG_PATH=$zig CARGO_ZIGBUILD_PYTHON_PATH=/nonexistent
    done
}

# The demo and the library's tests use the system's OpenSSL if its headers are installed, because building OpenSSL takes two minutes. The deployed
# function always has its own.
need_openssl() {
    have_openssl || apt_install libssl-dev pkg-config || true
    if have_openssl; then
        export SYSTEM_OPENSSL=1
    else
        printf '%s\n' "OpenSSL's headers (libssl-dev, openssl-devel) are not installed: building it from source takes two minutes more."
    fi
}

have_openssl() { pkg-config --exists 'openssl >= 1.1.1' 2>/dev/null; }

need_cargo() {
    command -v cargo >/dev/null || PATH=$PATH:${CARGO_HOME:-$HOME/.cargo}/bin
    command -v cargo >/dev/null || die "Rust is not installed (no cargo on PATH). Install it, then try again:" \
        "  curl --proto '=https' --tlsv1.2 -sSf https://sh.rustup.rs | sh"
    local found needed
    needed=$(sed -n 's/^rust-version = "\([0-9.]*\)".*/\1/p' "$ROOT/Cargo.toml")
    found=$(cd "$ROOT" && cargo --version) || die "cargo does not run in $ROOT."
    found=${found#cargo } found=${found%%[ -]*}
    at_least "$found" "$needed" || die "Rust $found is too old: the AWS SDK needs $needed. Try \`rustup update stable\`."
}

# at_least FOUND NEEDED: compares versions of three numbers.
at_least() {
    local f1 f2 f3 n1 n2 n3
    IFS=. read -r f1 f2 f3 <<<"$1"
    IFS=. read -r n1 n2 n3 <<<"$2"
    ((f1 != n1 ? f1 > n1 : f2 != n2 ? f2 > n2 : ${f3:-0} >= ${n3:-0}))
}

# OpenSSL's Configure uses modules that minimal perl packages lack.
have_build_tools() {
    command -v cc >/dev/null && command -v make >/dev/null && perl -MFile::Compare -MFindBin -MIPC::Cmd -e 1 2>/dev/null
}

need_build_tools() {
    have_build_tools && return
    apt_install build-essential perl pkg-config || true
    have_build_tools || die "Building OpenSSL needs a C compiler, make and perl with its modules. Install them, then try again:" \
        "  Debian, Ubuntu   sudo apt-get install build-essential perl pkg-config" \
        "  Fedora           sudo dnf install gcc make perl" \
        "  macOS            xcode-select --install"
}

# apt_install PACKAGE...: fails if there is no apt, or if sudo needs a password.
apt_install() {
    local sudo=()
    command -v apt-get >/dev/null || return
    if [ "$(id -u)" != 0 ]; then
        sudo -n true 2>/dev/null || return
        sudo=(sudo -n)
    fi
    # The last word is `sh`'s $0. A new machine has no package lists yet, so the first try may fail.
    # shellcheck disable=SC2016
    with_progress "Installing $* with apt" ${sudo[@]+"${sudo[@]}"} env DEBIAN_FRONTEND=noninteractive sh -c '
        install() { apt-get -qq -o DPkg::Lock::Timeout=120 install --yes --no-install-recommends "$@"; }
        install "$@" || { apt-get -qq update && install "$@"; }' sh "$@"
}

# need_python: sets PYTHON, the interpreter for the environments, and PYTHON_VERSION.
need_python() {
    find_python && return
    # Debian has this part of Python in a separate package.
    if [ -n "$INCOMPLETE" ]; then
        apt_install "python$INCOMPLETE-venv" || true
        find_python && return
        die "Python $INCOMPLETE lacks venv, ensurepip or ssl. Install them, then try again:" \
            "  Debian, Ubuntu   sudo apt-get install python$INCOMPLETE-venv"
    fi
    [ -z "${PYTHON:-}" ] || die "PYTHON=$PYTHON is not a Python from 3.11 to 3.13."
    die "LocalStack needs Python 3.11 to 3.13, but none of python3.13, python3.12, python3.11, python3 on PATH is one of these." \
        "If it is elsewhere: PYTHON=/path/to/python3 $0"
}

find_python() {
    local candidates=(python3.13 python3.12 python3.11 python3) candidate answer
    [ -z "${PYTHON:-}" ] || candidates=("$PYTHON")
    INCOMPLETE=
    for candidate in "${candidates[@]}"; do
        # Version managers put commands on PATH that only print that this version is missing. In an active environment, ours too, use the
        # interpreter that made it.
        answer=$("$candidate" -c 'import platform, sys; print(platform.python_version(), sys._base_executable)' 2>/dev/null) || continue
        case $answer in 3.11.* | 3.12.* | 3.13.*) ;; *) continue ;; esac
        if "$candidate" -c 'import ensurepip, ssl, venv' 2>/dev/null; then
            PYTHON=${answer#* } PYTHON_VERSION=${answer%% *}
            return
        fi
        INCOMPLETE=$(cut -d . -f 1-2 <<<"${answer%% *}")
    done
    return 1
}

# The lock belongs to the open file, which this shell holds, and pip too if it outlives us. macOS has no `flock` command.
lock() {
    exec 9>"$LOCAL/setup.lock"
    "$PYTHON" -c '
import fcntl
try:
    fcntl.flock(9, fcntl.LOCK_EX | fcntl.LOCK_NB)
except BlockingIOError:
    print("Waiting for another run that is setting up.", flush=True)
    fcntl.flock(9, fcntl.LOCK_EX)'
}

# The servers started later must not inherit it.
unlock() { exec 9>&-; }

# need_environment DIRECTORY NAME WHAT: makes a virtual environment from requirements/NAME.txt. A stamp is written last, so that an unfinished
# environment, or one from other requirements, is made again.
need_environment() {
    local directory=$1 requirements=$ROOT/local/requirements/$2.txt wanted
    wanted="$PYTHON_VERSION $directory $(digest "$requirements")"
    stamped "$directory/requirements.stamp" "$wanted" && "$directory/bin/python" -c '' 2>/dev/null && return
    rm -rf "$directory"
    "$PYTHON" -m venv "$directory"
    PACKAGES=$(sed -n "/win32/d; s/^\([A-Za-z0-9._-]*\)==\([^ ;]*\).*/\1-\2/p" "$requirements" | normalized)
    with_progress "Installing $3 into target/local (once)" install_requirements "$directory" "$requirements" ||
        die "The installation failed; its whole output is in $SETUP_LOG."
    PACKAGES=
    stamp "$directory/requirements.stamp" "$wanted"
}

# Installs with uv, in a tenth of pip's time; with pip if uv cannot be installed or cannot reach pip's index. `--no-deps`, because the requirements
# list every dependency, and older versions of pip fail to resolve one with extras.
install_requirements() {
    local options=(install --no-deps --require-hashes --requirement "$2")
    if need_uv && uv pip "${options[@]}" --python "$1/bin/python"; then return; fi
    "$1/bin/python" -m pip "${options[@]}" --progress-bar off
}

# packages: how many of the PACKAGES uv has downloaded and unpacked; nothing if pip installs them, as it does so only at the end.
packages() {
    [ -n "${PACKAGES:-}" ] || return 0
    local place unpacked
    unpacked=$(for place in "$LOCAL"/cache/uv/archive-v*/*/*.dist-info; do basename "$place" .dist-info; done |
        normalized | comm -12 - <(printf '%s\n' "$PACKAGES") | wc -l)
    [ $((unpacked)) = 0 ] || printf ', %s of %s packages' $((unpacked)) $(($(wc -l <<<"$PACKAGES")))
}

# Names of packages with versions, one a line, in one spelling.
normalized() { tr 'A-Z.-' 'a-z__' | sort -u; }

need_uv() {
    [ ! -x "$LOCAL/uv/bin/uv" ] || return 0
    rm -rf "$LOCAL/uv"
    "$PYTHON" -m venv "$LOCAL/uv" &&
        "$LOCAL/uv/bin/python" -m pip install --no-deps --require-hashes --progress-bar off --requirement "$ROOT/local/requirements/uv.txt"
}

uv() {
    local index
    index=${PIP_INDEX_URL:-$("$LOCAL/uv/bin/python" -m pip config get global.index-url 2>/dev/null)} || index=
    env ${index:+"UV_DEFAULT_INDEX=$index"} UV_SYSTEM_CERTS=1 UV_CACHE_DIR="$LOCAL/cache/uv" UV_PYTHON_DOWNLOADS=never "$LOCAL/uv/bin/uv" "$@"
}

need_executor() {
    local executor=$ROOT/local/executor copy=$LOCAL/executor wanted
    wanted=$(digest "$executor/pyproject.toml" "$executor"/process_executor/*.py)
    stamped "$VENV/executor.stamp" "$wanted" && return
    # From a copy: the build writes files beside the sources, and would pick up those of an earlier build.
    rm -rf "$copy"
    mkdir "$copy"
    cp -R "$executor/pyproject.toml" "$executor/process_executor" "$copy"
    with_progress "Installing the Lambda executor for LocalStack" \
        "$VENV/bin/python" -m pip install --no-cache-dir --force-reinstall --no-deps --no-build-isolation "$copy" ||
        die "The installation failed; its whole output is in $SETUP_LOG."
    rm -rf "$copy"
    stamp "$VENV/executor.stamp" "$wanted"
}

stamp() { printf '%s\n' "$2" >"$1"; }

stamped() { [ "$(cat "$1" 2>/dev/null)" = "$2" ]; }

digest() {
    "$PYTHON" -c 'import hashlib, sys; print(hashlib.sha256(b"\0".join(open(p, "rb").read() for p in sys.argv[1:])).hexdigest())' "$@"
}

# with_progress WHAT COMMAND...: prints WHAT, the elapsed time and `packages`, on one line of a terminal, or once a minute in a log. The command's
# output goes to SETUP_LOG; if it fails, its end also goes to the terminal.
with_progress() {
    local what=$1 ticker status=0 start=$SECONDS every=60 format='  ... %s s%s\n'
    shift
    if [ -t 1 ]; then every=1 format='\r'$what' ... %s s%s'; fi
    printf '%s ...' "$what"
    [ -t 1 ] || printf '\n'
    (
        while sleep "$every" >/dev/null 2>&1 && kill -0 $$ 2>/dev/null; do
            # shellcheck disable=SC2059
            printf "$format" $((SECONDS - start)) "$(packages)"
        done
    ) 9>&- &
    ticker=$!
    # In its own process group, so that all its processes can be ended.
    set -m
    "$@" >"$SETUP_LOG" 2>&1 </dev/null &
    set +m
    # shellcheck disable=SC2064
    trap "kill -- -$! $ticker 2>/dev/null; exit 130" INT TERM HUP
    wait $! || status=$?
    end_on_signals
    kill "$ticker" 2>/dev/null || true
    wait "$ticker" 2>/dev/null || true
    [ ! -t 1 ] || printf '\r%s: %s s\033[K\n' "$what" $((SECONDS - start))
    [ "$status" = 0 ] || tail -n 20 "$SETUP_LOG" >&2
    return "$status"
}
