#!/usr/bin/env bash
# The own tests of the decoder in C under native/, and a minute of its fuzzer (or as many seconds as the argument says)
# on the hostile files of the suite. What is missing of make, cc and clang is installed if this is root on Debian.
set -euo pipefail
cd "$(dirname "$0")/.."
python=$([ -x .venv/bin/python ] && echo .venv/bin/python || echo python)

fuzzes() { echo 'int LLVMFuzzerTestOneInput(const char *b, long n) { return b && n < 0; }' |
  clang -fsanitize=fuzzer,address,undefined -x c - -o /dev/null 2> /dev/null; }
ready() { command -v make > /dev/null && command -v cc > /dev/null && fuzzes; }

if ! ready && [ "$(id -u)" -eq 0 ] && command -v apt-get > /dev/null; then
  apt-get update -qq && DEBIAN_FRONTEND=noninteractive apt-get install -y -qq make gcc libc6-dev clang > /dev/null || true
fi
if ! command -v make > /dev/null || ! command -v cc > /dev/null; then
  echo "the decoder in C was not tested: make or cc is missing here, and could not be installed" >&2
  exit 0
fi
make -s -C native check
if ! fuzzes; then
  echo "the decoder in C was not fuzzed: clang with libFuzzer is missing here, and could not be installed" >&2
  exit 0
fi
PYTHONPATH=.:tests "$python" tests/native/corpus.py native/build/hostile
make -s -C native fuzz CORPUS=build/hostile SECONDS="${1:-60}"
