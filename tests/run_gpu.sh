#!/usr/bin/env bash
# Everything about the tests that only a GPU tells. Builds nothing: the extension must be built with its CUDA half.
#   tests/run_gpu.sh            the tests that are marked cuda or take the device fixture
#   tests/run_gpu.sh sanitize   compute-sanitizer over tests/gpu_smoke.py: memcheck, then initcheck and synccheck
set -uo pipefail
cd "$(dirname "$0")/.."
python=${PYTHON:-python3}
case "${1:-tests}" in
  tests)
    "$python" -m fastmoe_cpp doctor || exit 1
    shift $(( $# > 0 ? 1 : 0 ))
    exec "$python" -m pytest tests -q -p no:cacheprovider -m cuda --durations=10 "$@"
    ;;
  sanitize)
    # torch's caching allocator would hide an access past an allocation's end
    export PYTORCH_NO_CUDA_MEMORY_CACHING=1 PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}"
    status=0
    for tool in memcheck initcheck synccheck; do
      quick=$([ $tool = memcheck ] || echo --quick)
      echo "== $tool"
      compute-sanitizer --tool $tool --error-exitcode 9 --print-limit 5 "$python" tests/gpu_smoke.py $quick || status=1
    done
    exit $status
    ;;
  *)
    echo "usage: tests/run_gpu.sh [tests [pytest options] | sanitize]" >&2
    exit 2
    ;;
esac
