#!/usr/bin/env bash
# Build KenLM's lmplz, build_binary and query into .kenlm/bin (3 minutes on 2 cores; does nothing when they are there).
# The wheel ufal.kenlm only queries; no wheel carries a working lmplz, the source package on PyPI builds one.
set -euo pipefail
cd "$(dirname "$0")/.."

VERSION=0.3.0
SHA256=c4628bb9fb63c8a6f9240035b8b037385cfc404cb72e933cf48878291edac1e8
PROGRAMS=(lmplz build_binary query)
PACKAGES=(cmake make g++ libboost-program-options-dev libboost-system-dev libboost-thread-dev libboost-test-dev
          zlib1g-dev libbz2-dev liblzma-dev)

[[ -x .kenlm/bin/lmplz && -x .kenlm/bin/build_binary && -x .kenlm/bin/query ]] && { echo "kenlm: .kenlm/bin is there"; exit 0; }

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

# moved at the end, so that a build cut off halfway is not taken for a whole one
mkdir -p .kenlm/bin
for program in "${PROGRAMS[@]}"; do install "$work/build/bin/$program" .kenlm/bin/; done
echo "kenlm: built ${PROGRAMS[*]} into .kenlm/bin"
