#!/usr/bin/env bash
# Everything about the tests that only a GPU tells. Builds nothing: the extension must be built with its CUDA half.
#   tests/run_gpu.sh            the tests that are marked cuda or take the device fixture
#   tests/run_gpu.sh sanitize   compute-sanitizer over tests/gpu_smoke.py: memcheck, synccheck, initcheck, racecheck
set -uo pipefail
cd "$(dirname "$0")/.."
python=${PYTHON:-python3}
case "${1:-tests}" in
  tests)
    "$python" -m fastmoe_cpp doctor || exit 1
    shift $(( $# > 0 ? 1 : 0 ))
    # each failure as it comes: whoever ends the run early has seen them
    "$python" -m pytest tests -v -p no:cacheprovider -m cuda --durations=10 "$@" |
      grep --line-buffered -v -e ' PASSED' -e '^tests/.*:: *$' -e ' SKIPPED'
    exit "${PIPESTATUS[0]}"
    ;;
  sanitize)
    # torch's caching allocator would hide an access past an allocation's end
    export PYTORCH_NO_CUDA_MEMORY_CACHING=1 PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}"
    status=0
    check() { # tool, its options
      echo "== $1"
      compute-sanitizer --tool "$1" --error-exitcode 9 --print-limit 5 "${@:2}" "$python" tests/gpu_smoke.py $quick
    }
    quick= check memcheck || status=1
    # The portable GEMM's warps meet at one barrier from two places of the code, which PTX allows and synccheck reports.
    quick=--quick check synccheck --kernel-name-exclude kernel_substring=portable || status=1
    # The slow ones in parts beside each other: three minutes on 16 cores.
    said=$(mktemp -d)
    trap 'rm -rf "$said"' EXIT
    parts() { # tool, its options and the program's
      for part in 0 1 2 3; do
        compute-sanitizer --tool "$1" --print-limit 1000000 "${@:3}" "$python" tests/gpu_smoke.py --part $part/4 $2 \
          >"$said/$1.$part" 2>&1 &
      done
    }
    parts initcheck "--quick --small"
    parts racecheck --quick --racecheck-report analysis
    wait
    # cuBLAS writes by TMA, which initcheck does not see: whoever reads a product's result is named here. Nobody else may.
    echo "== initcheck: kernels that read what it saw nobody write"
    sed -n 's/^=*  *at \(.*\)+0x.*/\1/p' "$said"/initcheck.* | cut -c1-150 | sort | uniq -c
    # Shared memory alone. docs/kernels-races.md: what stands between writers and readers, and what is known to be right.
    echo "== racecheck: what to look up there"
    grep -ah -A1 'Race reported' "$said"/racecheck.* | sed 's/+0x[0-9a-f]*//g; s/ \[.*//' | cut -c1-200 | sort | uniq -c
    for file in "$said"/*; do
      if ! grep -aq '^smoke: ' "$file"; then
        echo "$(basename "$file") did not run to its end: $(tail -n 1 "$file" | cut -c1-300)"
        status=1
      fi
    done
    exit $status
    ;;
  *)
    echo "usage: tests/run_gpu.sh [tests [pytest options] | sanitize]" >&2
    exit 2
    ;;
esac
