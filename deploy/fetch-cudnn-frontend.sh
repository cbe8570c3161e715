#!/bin/sh
# Puts the headers of cudnn-frontend into $1/include, once. They are header-only and come inside
# a Python package, whatever Python is here. Needs python3 with pip, or with venv.
set -eu
version=1.14.1
digest=a41008635559f223257e78b7b1d6c26b6f7f8742a56b2a0cc3341d1b3ad81b66
dest=$1
[ -f "$dest/$version" ] && exit 0

work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
pip="python3 -m pip"
if ! $pip --version > /dev/null 2>&1; then
  python3 -m venv "$work/venv"
  pip="$work/venv/bin/python -m pip"
fi
echo "nvidia-cudnn-frontend==$version --hash=sha256:$digest" > "$work/requirements.txt"
$pip download -q --disable-pip-version-check --no-deps --require-hashes --only-binary=:all: \
  --python-version 3.11 --implementation cp --abi cp311 --platform manylinux_2_28_x86_64 \
  -d "$work" -r "$work/requirements.txt"
rm -rf "$dest"
mkdir -p "$dest"
python3 -m zipfile -e "$work"/*.whl "$work/unpacked"
cp -R "$work/unpacked/include" "$dest"
touch "$dest/$version"
