#!/usr/bin/env bash
# Installs this checkout with exactly the packages in requirements.txt, whose hashes pip checks: all dependencies, the
# indirect ones and those of every extra included. Ray needs the same versions, and the same Python minor version, on
# every node. To make that file anew after a change of pyproject.toml:
#   uv pip compile --universal --all-extras --generate-hashes --no-header --no-annotate \
#     pyproject.toml -o cluster/requirements.txt && sed -i -z 's/ \\\n */ /g' cluster/requirements.txt
#
#   cluster/install.sh PYTHON [PACKAGE...]      PYTHON: the interpreter to install into; PACKAGE: further packages
#
# Where there is no code (the first layer of the Dockerfile) it installs the dependencies alone.
set -euo pipefail

python=${1:?usage: cluster/install.sh PYTHON [PACKAGE...]}
shift
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)

"$python" -m pip install --no-cache-dir --only-binary :all: --require-hashes -r "$root/cluster/requirements.txt"
if (($#)); then
  "$python" -m pip freeze --exclude ncfm-ray | "$python" -m pip install --no-cache-dir -c /dev/stdin "$@"
fi
if [[ -d $root/ncfm ]]; then
  "$python" -m pip install --no-cache-dir --no-deps "$root"
fi
