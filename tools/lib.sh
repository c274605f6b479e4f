# shellcheck shell=bash
# SPDX-License-Identifier: MIT
# What tools/demo, tools/test and tools/bench share. Works with bash 3.2 (macOS) and newer.
set -u -o pipefail

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
cd "$root" || exit 1
tool="tools/$(basename "$0")"

# Checkouts in different folders share what ccache holds.
export CCACHE_BASEDIR=$root CCACHE_NOHASHDIR=true

say() { printf '%s\n' "$*"; }
complain() { printf '%s: %s\n' "$tool" "$*" >&2; }
usage_error() {
  complain "$* (see 'bash $tool --help')"
  exit 2
}
has() { command -v "$1" >/dev/null 2>&1; }

# The comment block at the top of the calling script is its help text.
print_help() { sed -n '/^# Usage/,/^[^#]/{ s/^# \{0,1\}//p; }' "$0"; }

# ---------------------------------------------------------------------------------------------------- what must be there
has_header() {
  printf '#if !__has_include(<%s>)\n#error\n#endif\n' "$1" | "${CXX:-c++}" -x c++ -E - >/dev/null 2>&1
}
has_any_file() {
  local file
  for file in "$@"; do [ -e "$file" ] && return 0; done
  return 1
}
has_compiler() { has "${CXX:-c++}"; }
has_make() { has ninja || has make; }
has_xsimd() { [ -n "${FOVEA_XSIMD_INCLUDE_DIR:-}" ] || has_header xsimd/xsimd.hpp; }
has_catch2() { has_header catch2/catch_all.hpp || has_header catch2/catch.hpp; }
has_json() { has_header nlohmann/json.hpp; }
has_cli11() { has_header CLI/CLI.hpp; }
has_benchmark() { has_header benchmark/benchmark.h; }
has_eigen() {
  has_header Eigen/Core || has_any_file {/usr,/usr/local,/opt/homebrew}/include/eigen3/Eigen/Core
}
has_numpy() {
  python3 -c 'import numpy' >/dev/null 2>&1 || /usr/bin/python3 -c 'import numpy' >/dev/null 2>&1
}
has_pip() { python3 -m pip --version >/dev/null 2>&1; }
has_clang() { has clang++; }
has_browser() { has chromium || has chromium-browser || has google-chrome || has google-chrome-stable; }

# One line a need: probe, then its package on Debian and Ubuntu, Fedora, Arch, Homebrew.
need_table='compiler   g++                gcc-c++                gcc           gcc
cmake      cmake              cmake                  cmake         cmake
make       ninja-build        ninja-build            ninja         ninja
ccache     ccache             ccache                 ccache        ccache
xsimd      libxsimd-dev       xsimd-devel            xsimd         xsimd
json       nlohmann-json3-dev json-devel             nlohmann-json nlohmann-json
cli11      libcli11-dev       cli11-devel            cli11         cli11
benchmark  libbenchmark-dev   google-benchmark-devel benchmark     google-benchmark
catch2     catch2             catch2-devel           catch2        catch2
eigen      libeigen3-dev      eigen3-devel           eigen         eigen
clang      clang              clang                  clang         llvm
python3    python3            python3                python        python
numpy      python3-numpy      python3-numpy          python-numpy  numpy
pip        python3-pip        python3-pip            python-pip    python
browser    chromium           chromium               chromium      --cask~chromium'

package_of() { # NEED COLUMN
  printf '%s\n' "$need_table" | awk -v need="$1" -v column="$2" '$1 == need { sub("~", " ", $column); print $column }'
}
missing_of() { # NEED... -> those that are not here
  local need
  for need in "$@"; do
    if [ "$(type -t "has_$need")" = function ]; then "has_$need" || say "$need"; else has "$need" || say "$need"; fi
  done
}
packages_of() { # COLUMN NEED...
  local column=$1 need
  shift
  for need in "$@"; do package_of "$need" "$column"; done | tr '\n' ' '
}

# require NEED...: installs what is missing where apt may do so; otherwise names the packages and ends with exit code 2.
require() {
  local missing asroot=""
  missing=$(missing_of "$@")
  [ -z "$missing" ] && return 0
  # shellcheck disable=SC2086
  set -- $missing
  if has apt-get; then
    [ "$(id -u)" -eq 0 ] || asroot="sudo -n"
    if [ -z "$asroot" ] || sudo -n true >/dev/null 2>&1; then
      say "Installing: $(packages_of 2 "$@")"
      # shellcheck disable=SC2046
      { $asroot env DEBIAN_FRONTEND=noninteractive apt-get update -qq &&
        $asroot env DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends $(packages_of 2 "$@"); } \
        </dev/null >"${TMPDIR:-/tmp}/fovea-apt.log" 2>&1 || tail -n 20 "${TMPDIR:-/tmp}/fovea-apt.log"
      hash -r
      missing=$(missing_of "$@")
      [ -z "$missing" ] && return 0
      # shellcheck disable=SC2086
      set -- $missing
    fi
  fi
  complain "these are missing: $(printf '%s ' "$@")
  Install them and start again (as root on Debian or Ubuntu, or with a sudo that asks no password, they are installed for you):
  Debian, Ubuntu:  apt-get install $(packages_of 2 "$@")
  Fedora:          dnf install $(packages_of 3 "$@")
  Arch:            pacman -S $(packages_of 4 "$@")
  Homebrew:        brew install $(packages_of 5 "$@")"
  exit 2
}

# CMake 3.25 is what the presets and the header sets need.
require_cmake_version() {
  local version
  version=$(cmake --version | sed -n '1s/[^0-9]*\([0-9]*\.[0-9]*\).*/\1/p')
  if [ "$(printf '%s\n3.25\n' "$version" | sort -t. -k1,1n -k2,2n | head -n 1)" != 3.25 ]; then
    complain "CMake 3.25 or newer is needed, this is $version ('pip install cmake' brings a current one)"
    exit 2
  fi
}

# ---------------------------------------------------------------------------------------------------- building
cores() { nproc 2>/dev/null || sysctl -n hw.ncpu 2>/dev/null || echo 2; }
jobs_count() { # one per core, and one per 2 GiB of memory: a translation unit of templates takes about 1 GiB
  local count memory
  count=$(cores)
  memory=$(awk '/^MemAvailable/ { print int($2 / 2097152) }' /proc/meminfo 2>/dev/null)
  if [ -n "$memory" ] && [ "$memory" -lt "$count" ]; then count=$memory; fi
  [ "$count" -ge 1 ] || count=1
  echo "$count"
}

# configure PRESET [-DNAME=VALUE...]: into build/<folder>; the folder is the preset's unless `folder` is set.
configure() {
  local preset=$1 dir=build/${folder:-$1}
  shift
  set -- "$@" ${FOVEA_XSIMD_INCLUDE_DIR:+"-DFOVEA_XSIMD_INCLUDE_DIR=$FOVEA_XSIMD_INCLUDE_DIR"}
  if [ ! -e "$dir/CMakeCache.txt" ] && has ninja; then set -- -G Ninja "$@"; fi
  cmake --preset "$preset" -B "$root/$dir" --log-level=NOTICE "$@"
}
# build FOLDER [TARGET...]: goes on after an error, to show them all.
build() {
  local dir=build/$1 go_on=-k
  shift
  [ $# -eq 0 ] || set -- --target "$@"
  if grep -q '^CMAKE_GENERATOR:INTERNAL=Ninja' "$dir/CMakeCache.txt"; then go_on="-k 0"; fi
  # shellcheck disable=SC2086
  cmake --build "$root/$dir" -j "$(jobs_count)" "$@" -- $go_on
}
