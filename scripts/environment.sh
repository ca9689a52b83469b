# Sourced by the other scripts: the Python environment that they run in, and nothing else.
#
#   run_baton EXTRA COMMAND [argument ...]  runs `baton COMMAND` in an environment with EXTRA (may be empty)
#   take_no_install "$@"                    sets `no_install` (yes or no) and `arguments` (the rest)
#   make_environment [extra]                sets `python`; makes or renews .venv unless no_install is yes
#
# --no-install among the arguments: use the python3 on the PATH, with what is installed there, instead of .venv.
# Renewing is skipped, in well under a second, as long as the stamp in .venv names the same pyproject.toml in the same place.

set -euo pipefail
root=$(CDPATH='' cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.." && pwd)
torch_cpu="torch==2.13.0"
torch_cpu_index="https://download.pytorch.org/whl/cpu"

run_baton() {
    local extra=$1 command=$2
    take_no_install "${@:3}"
    make_environment "$extra"
    exec "$python" -P -m baton "$command" ${arguments[@]+"${arguments[@]}"}
}

take_no_install() {
    no_install=no
    arguments=()
    local argument
    for argument in "$@"; do
        if [[ $argument == --no-install ]]; then no_install=yes; else arguments+=("$argument"); fi
    done
}

make_environment() {
    local extra=${1:-}
    link_package
    export PYTHONPATH=$link${PYTHONPATH:+:$PYTHONPATH} # so that this checkout is what runs, whatever is installed
    if [[ $no_install == yes ]]; then
        python=$(command -v python3 || command -v python) || fail "there is no python3 on the PATH"
        return
    fi
    python=$root/.venv/bin/python
    local wanted
    wanted="$(cksum <"$root/pyproject.toml") $root"
    if is_installed "$wanted" "$extra"; then return; fi
    # Two scripts started at once must not install into the same folder: the second waits, then finds it done.
    if command -v flock >/dev/null; then
        exec 9>"$root/.venv.lock"
        flock 9
    fi
    if ! is_installed "$wanted" "$extra"; then install_all "$wanted" "$extra"; fi
    if command -v flock >/dev/null; then exec 9>&-; fi
}

# The root of the repository is the package `baton`. `link` is a folder in which it has that name: in the checkout, or,
# where that is read-only, in the user's cache.
link_package() {
    local folder
    for folder in "$root/.link" "${XDG_CACHE_HOME:-$HOME/.cache}/baton/$(printf '%s' "$root" | cksum | tr ' ' -)"; do
        link=$folder
        if [[ $link/baton -ef $root ]]; then return; fi
        if mkdir -p "$link" 2>/dev/null && ln -sfn "$root" "$link/baton" 2>/dev/null; then return; fi
    done
    fail "cannot make a link to $root, neither in it nor in $link"
}

is_installed() { # stamp's first line: pyproject.toml's checksum and place; second: the extra installed (test holds all)
    local stamp=$root/.venv/baton-installed first="" second=""
    [[ -x $python && -f $stamp ]] || return 1
    { read -r first; read -r second; } <"$stamp" || true
    [[ $first == "$1" && ( -z $2 || $second == "$2" || $second == test ) ]]
}

install_all() {
    local extra=$2
    exec 8>&2 # where attempts are silent, progress is not
    if ! "$python" -c "" 2>/dev/null; then
        local base
        base=$(find_python)
        say "making .venv with $("$base" --version)"
        "$base" -m venv --clear "$root/.venv"
    fi
    rm -f "$root/.venv/baton-installed"
    install_cpu_torch
    say "installing baton-serve${extra:+[$extra]} (a few minutes the first time)"
    pip_install -e "$root${extra:+[$extra]}"
    compile_installed
    exec 8>&-
    printf '%s\n%s\n' "$1" "$extra" >"$root/.venv/baton-installed"
    say "environment ready"
}

# On Linux, PyPI's torch is the CUDA build, with gigabytes of libraries that a machine without GPU has no use for. The
# CPU build is taken from pip's configured sources if it is there (a mirror, find-links), else from PyTorch's own index.
install_cpu_torch() {
    if [[ $(uname -s) != Linux ]] || nvidia-smi -L >/dev/null 2>&1; then return; fi
    if "$python" -c "import importlib.util as u; raise SystemExit(u.find_spec('torch') is None)"; then return; fi
    say "no NVIDIA GPU here: installing the CPU build of PyTorch (about 200 MB)"
    if pip_install "$torch_cpu+cpu" 2>/dev/null; then return; fi
    if pip_install "$torch_cpu+cpu" --extra-index-url "$torch_cpu_index"; then return; fi
    say "no CPU build for this platform: the next step takes what pip finds"
}

pip_install() { # progress bars on a terminal; in a log a line every few seconds, and errors
    local pip=("$python" -m pip --disable-pip-version-check install --no-compile)
    if [[ -t 2 ]]; then
        "${pip[@]}" "$@" >&2
        return
    fi
    local status=0
    say_still_installing 9>&- &
    local ticker=$!
    "${pip[@]}" -qq "$@" >&2 || status=$?
    kill "$ticker" 2>/dev/null || true
    wait "$ticker" 2>/dev/null || true
    return "$status"
}

# On all cores, while pip would use one: a minute of a core for 15,000 files. Some are not for this Python.
compile_installed() {
    local folder
    folder=$("$python" -c "import sysconfig; print(sysconfig.get_path('purelib'))")
    "$python" -m compileall -q -j 0 "$folder" >/dev/null 2>&1 || true
}

say_still_installing() { # until it is killed, or the script has gone
    local seconds=0
    while sleep 10 >/dev/null 2>&1 8>&- && kill -0 $$ 2>/dev/null; do # the sleep outlives its shell: it holds no pipe
        seconds=$((seconds + 10))
        say "still installing ($seconds s)" 2>&8
    done
}

find_python() {
    local candidate
    for candidate in python3 python3.13 python3.12 python3.11; do
        if "$candidate" -c "import sys; raise SystemExit(not (3, 11) <= sys.version_info < (3, 14))" 2>/dev/null; then
            command -v "$candidate"
            return
        fi
    done
    fail "Python 3.11, 3.12 or 3.13 is needed, and none was found on the PATH"
}

say() { printf '%s\n' "baton: $*" >&2; }

fail() {
    say "$*"
    exit 1
}
