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
    # cuBLAS writes by TMA, which initcheck does not see: whoever reads a product's result is named here. Nobody else may.
    echo "== initcheck: kernels that read what it saw nobody write"
    compute-sanitizer --tool initcheck --print-limit 1000000 "$python" tests/gpu_smoke.py --quick |
      sed -n 's/^=*  *at \(.*\)+0x.*/\1/p' | sort | uniq -c | cut -c1-200
    # Shared memory alone. docs/kernels-races.md: what stands between writers and readers, and what is known to be right.
    echo "== racecheck: what to look up there"
    compute-sanitizer --tool racecheck --racecheck-report analysis --print-limit 1000000 "$python" tests/gpu_smoke.py --quick |
      grep -a -e 'Race reported' -e 'SUMMARY' | cut -c1-300 | sort | uniq -c
    exit $status
    ;;
  *)
    echo "usage: tests/run_gpu.sh [tests [pytest options] | sanitize]" >&2
    exit 2
    ;;
esac
