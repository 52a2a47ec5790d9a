#!/usr/bin/env bash
# Installs this checkout with the exact versions in constraints.txt, those of indirect dependencies included: Ray needs
# the same versions, and the same Python minor version, on every node. To make that file anew after a change of
# pyproject.toml:
#   uv pip compile --universal --all-extras --no-header --no-annotate pyproject.toml -o cluster/constraints.txt
#
#   cluster/install.sh PYTHON [PACKAGE...]      PYTHON: the interpreter to install into; PACKAGE: further packages
#
# Where only pyproject.toml is present (the first layer of the Dockerfile) it installs the dependencies alone.
set -euo pipefail

python=${1:?usage: cluster/install.sh PYTHON [PACKAGE...]}
shift
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
requirements=$(mktemp)
trap 'rm -f "$requirements"' EXIT

"$python" - "$root/pyproject.toml" >"$requirements" <<'PY'
import pathlib
import sys
import tomllib

project = tomllib.loads(pathlib.Path(sys.argv[1]).read_text())
print("\n".join(project["project"]["dependencies"]))
PY

"$python" -m pip install --no-cache-dir -c "$root/cluster/constraints.txt" -r "$requirements" "$@"
if [[ -d $root/ncfm ]]; then
  "$python" -m pip install --no-cache-dir --no-deps "$root"
fi
