#!/usr/bin/env bash
# Build KenLM's lmplz, build_binary and query into .kenlm/bin: 3 minutes on 2 cores; seconds when an earlier build is in
# the user's cache; nothing when they are there. The wheel ufal.kenlm only queries; no wheel carries a working lmplz, the source package on PyPI builds one.
set -euo pipefail
cd "$(dirname "$0")/.."

VERSION=0.3.0
SHA256=c4628bb9fb63c8a6f9240035b8b037385cfc404cb72e933cf48878291edac1e8
PROGRAMS=(lmplz build_binary query)
PACKAGES=(cmake make g++ libboost-program-options-dev libboost-system-dev libboost-thread-dev libboost-test-dev
          zlib1g-dev libbz2-dev liblzma-dev)

# all programs in a folder, and able to start: the libraries they were built with may be gone (127)
whole() {
  for program in "${PROGRAMS[@]}"; do
    [[ -x $1/$program ]] || return 1
    local status=0
    "$1/$program" --help >/dev/null 2>&1 </dev/null || status=$?
    [[ $status != 127 ]] || return 1
  done
}

whole .kenlm/bin && exit 0
cache="${XDG_CACHE_HOME:-$HOME/.cache}/gristmill/kenlm-$VERSION-$(uname -m)"
if whole "$cache"; then
  mkdir -p .kenlm/bin
  cp "${PROGRAMS[@]/#/$cache/}" .kenlm/bin/
  echo "kenlm: copied from $cache"
  exit 0
fi

missing=()
for package in "${PACKAGES[@]}"; do
  dpkg-query -W -f '${Status}' "$package" 2>/dev/null | grep -q 'ok installed' || missing+=("$package")
done
if ((${#missing[@]})); then
  install="apt-get install -y --no-install-recommends ${missing[*]}"
  [[ $(id -u) == 0 ]] || { echo "kenlm: Debian packages are missing; run: sudo $install" >&2; exit 1; }
  apt-get update -qq
  $install
fi

work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
# --no-binary names kenlm alone: with :all: pip compiles cmake itself, for half an hour
"${PYTHON:-python3}" -m pip download -q --no-deps --no-binary kenlm -d "$work" "kenlm==$VERSION"
echo "$SHA256  $work/kenlm-$VERSION.tar.gz" | sha256sum -c --quiet
tar xzf "$work/kenlm-$VERSION.tar.gz" -C "$work"
cmake -S "$work/kenlm-$VERSION" -B "$work/build" -DCMAKE_BUILD_TYPE=Release >"$work/log" 2>&1 &&
  make -C "$work/build" -j"$(nproc)" "${PROGRAMS[@]}" >>"$work/log" 2>&1 || { tail -n 40 "$work/log" >&2; exit 1; }

# installed at the end, so that a build cut off halfway is not taken for a whole one
for folder in "$cache" .kenlm/bin; do
  mkdir -p "$folder"
  for program in "${PROGRAMS[@]}"; do install "$work/build/bin/$program" "$folder/"; done
done
echo "kenlm: built ${PROGRAMS[*]} into .kenlm/bin"
