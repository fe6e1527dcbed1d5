#!/bin/sh
# Makes the environment of `deformvos benchmark --peers`: EdgeTAM and SAM 2 of transformers, which need torchvision and
# timm. It is one of its own because nothing else here needs them.
#
#     scripts/make_peers_env.sh [FOLDER]            default .venv-peers
#
# PYTHON names the interpreter (default python3). PIP_ARGS is given to pip; with a proper pair of CPU wheels:
#     PIP_ARGS="--extra-index-url https://download.pytorch.org/whl/cpu" scripts/make_peers_env.sh
# torch and torchvision are of one release. torchvision is installed without its dependencies, so that it does not
# replace a CPU build of torch; where its compiled operators do not load beside that build, the benchmark does without
# them.
set -eu
root=$(cd "$(dirname "$0")/.." && pwd)
folder=${1:-.venv-peers}
"${PYTHON:-python3}" -m venv "$folder"
pip="$folder/bin/python -m pip install"
# shellcheck disable=SC2086  PIP_ARGS holds several words
$pip ${PIP_ARGS:-} -c "$root/constraints.txt" "torch==2.13.0" transformers numpy pillow av safetensors pyyaml
# shellcheck disable=SC2086
$pip ${PIP_ARGS:-} --no-deps "torchvision==0.28.0" "timm==1.0.31"
"$folder/bin/python" -c "import av, timm, torch, transformers" 2>/dev/null ||
    "$folder/bin/python" -c "import av, torch, transformers"
echo "Made $folder: deformvos benchmark --peers --peers-python $folder/bin/python"
