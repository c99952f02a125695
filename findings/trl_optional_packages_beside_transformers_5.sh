#!/usr/bin/env bash
# trl 0.24.0 with transformers 5.24.0 (Python 3.11), which its requirements allow: optional packages that are not
# installed pass for installed, so that importing a trainer fails with the name of a package that nobody asked for.
#
# trl's import_utils asks transformers' `_is_package_available`. Up to transformers 4 it answers True or False; since 5 a
# pair of the answer and the version, and a pair is true, whatever stands in it. `if is_..._available():` then imports
# what is not there. Some of trl's names unpack the pair and are right, so that a look at one of them is no proof.
# Whoever must stay at this trl (later ones have the losses inside of their trainers) takes the first of each pair.
#
# Output seen:
#   trl 0.24.0, transformers 5.24.0
#   not installed, and said to be so:      is_liger_kernel_available is_vllm_available
#   not installed, and said to be there:   is_llm_blender_available is_mergekit_available is_weave_available
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
pip=("$folder/venv/bin/python" -m pip install --quiet --disable-pip-version-check)
"${pip[@]}" 'transformers==5.24.0'
"${pip[@]}" --no-deps 'trl==0.24.0'
"$folder/venv/bin/python" - <<'PYTHON'
from importlib.metadata import version
from importlib.util import find_spec

from trl import import_utils

print(f"trl {version('trl')}, transformers {version('transformers')}")
said: dict[bool, list[str]] = {False: [], True: []}
for package in ("liger_kernel", "llm_blender", "mergekit", "vllm", "weave"):
    assert find_spec(package) is None
    name = f"is_{package}_available"
    said[bool(getattr(import_utils, name)())].append(name)
print("not installed, and said to be so:     ", *said[False])
print("not installed, and said to be there:  ", *said[True])
assert "is_mergekit_available" in said[True], "a package that is not there is told so"
assert said[False], "no name unpacks the pair"
PYTHON
