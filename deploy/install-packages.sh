#!/bin/sh
# Installs what is missing of packages.txt and of its arguments, asking nothing. Does nothing when all
# of it is there.
set -eu
packages="$(grep -v '^#' "$(dirname "$0")/packages.txt") $*"

if ! command -v dpkg-query > /dev/null; then
  echo "install-packages.sh: this is not Debian or Ubuntu; install what these provide:" $packages >&2
  exit 1
fi

missing=""
for package in $packages; do
  dpkg-query -W -f '${db:Status-Status}\n' "$package" 2> /dev/null | grep -qx installed ||
    missing="$missing $package"
done
[ -n "$missing" ] || exit 0

as_root=""
[ "$(id -u)" = 0 ] || as_root=sudo
echo "installing:$missing"
$as_root apt-get update -q
$as_root env DEBIAN_FRONTEND=noninteractive \
  apt-get install -y -q --no-install-recommends $missing
