#!/usr/bin/env bash
# Make the virtual environment $2 with the interpreter $1: the locked packages and, editable, this one. Called by make.
set -euo pipefail
python=$1 venv=$2
lock=requirements/cpu.txt

"$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' || {
    echo "Python 3.11 or newer is needed, $python is $("$python" -V); make PYTHON=/path/to/python3.11" >&2
    exit 1
}
[ -x "$venv/bin/python" ] || "$python" -m venv "$venv"
pip=("$venv/bin/python" -m pip --disable-pip-version-check)

echo "== pip"
"${pip[@]}" install --quiet --upgrade pip
torch=$(grep '^torch==' "$lock")
echo "== $torch"
"${pip[@]}" install --no-compile --no-deps "$torch" || "${pip[@]}" install --no-compile "${torch%+cpu}"
echo "== the packages of $lock"
grep -v '^torch==' "$lock" | "${pip[@]}" install --no-compile --no-deps --requirement /dev/stdin
echo "== bytecode"
# pip would compile with one process, and also the packages' own tests. A file that is no valid Python stays as it is.
packages=$("$venv/bin/python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')
"$venv/bin/python" -m compileall -qq -j 0 -x 'site-packages/.*/tests?/' "$packages" || true
echo "== vllm-omni"
"${pip[@]}" install --quiet --no-deps --no-build-isolation --editable .
