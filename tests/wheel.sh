#!/usr/bin/env bash
# The wheel as its users have it: built, installed into a fresh environment, and run from another folder without network.
#   data => train a few steps => sample, with the recipes inside the wheel
set -euo pipefail
cd "$(dirname "$0")/.."
root=$PWD
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
unset PYTHONPATH

"${PYTHON:-python3}" -m venv "$work/venv"
mkdir "$work/source"  # built from a copy: another installation of this checkout may be writing beside it
git ls-files -z --cached --others --exclude-standard | tar --null -T - -cf - | tar -xf - -C "$work/source"
# files alone: Python compiles what it imports, the rest of 1.9 GB never is
pip="$work/venv/bin/python -m pip --disable-pip-version-check --quiet"
$pip wheel --no-deps --wheel-dir "$work" "$work/source"
$pip install --no-compile --constraint constraints.txt "$(echo "$work"/ldm-*.whl)[demo]"

mkdir "$work/elsewhere" "$work/offline"
cat > "$work/offline/sitecustomize.py" <<'END'
import socket

connect = socket.socket.connect


def guarded(self, address):
    if isinstance(address, tuple) and address[0] not in ("127.0.0.1", "::1"):  # else a socket file
        raise OSError(f"no network in this test: {address}")
    return connect(self, address)


socket.socket.connect = guarded
END
cd "$work/elsewhere"
export PATH="$work/venv/bin:$PATH" PYTHONPATH="$work/offline" HOME="$work/elsewhere"
python - "$root" <<'END'
import sys
from pathlib import Path

import ldm

assert not Path(ldm.__file__).is_relative_to(sys.argv[1]), ldm.__file__
END

expect() { # a text that the output of a command holds, which may fail
  local expected=$1 output
  shift
  output=$("$@" 2>&1) || true
  case $output in *"$expected"*) ;; *) printf '%s\nexpected %q in the output of: %s\n' "$output" "$expected" "$*" && exit 1 ;; esac
}
expect "Generate pictures from prompts" ldm sample --help
expect "there is no model in models/emoji" ldm app
expect "train one: " ldm sample
expect "expected a YAML file, or one of aspect, base256, demo" ldm train ldm --config dmo

few="run=run data.source=pictures doctor=false loop.threads=1"
ldm data openmoji pictures --subset demo --size 64
# shellcheck disable=SC2086
ldm train vae --config demo $few vae_training.steps=2 vae_training.batch_size=4
# shellcheck disable=SC2086
ldm train ldm --config demo $few vae=null loop.steps=2 loop.half_size_steps=0 loop.batch_size=4 loop.sample_every=0
ldm sample run/pipeline "red heart" --steps 2 --seed 7 --out heart.png
ldm sample run/pipeline --like heart.png --out again.png
cmp heart.png again.png
expect 'pip install "ldm[app]"' ldm app --model run/pipeline
echo "the wheel of $(ldm --version) installs, trains and samples from another folder, offline"
