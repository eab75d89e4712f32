#!/usr/bin/env bash
# What only several GPUs tell, on a machine with two. Builds nothing: the extension must be built with its CUDA half.
#   tests/run_gpu2.sh [all]               all of these, in under ten minutes
#   tests/run_gpu2.sh smoke               symmetric memory step by step (tests/gpu2_smoke.py)
#   tests/run_gpu2.sh tests [options]     the tests of several ranks by NCCL (options are pytest's)
#   tests/run_gpu2.sh bench [options]     benchmarks/gpu_parallel.py (options are its own)
# Everything is ended by a time limit of its own, so that ranks that wait for each other cost minutes and not the machine.
set -uo pipefail
cd "$(dirname "$0")/.."
python=${PYTHON:-python3}
export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}" PYTHONUNBUFFERED=1 OMP_NUM_THREADS=4
# an NVLink multicast object that outlives its program can put the GPUs of a shared host out of service
export NCCL_NVLS_ENABLE=${NCCL_NVLS_ENABLE:-0} TORCH_SYMM_MEM_DISABLE_MULTICAST=${TORCH_SYMM_MEM_DISABLE_MULTICAST:-1}

limited() { # seconds, command: says how it ended and after how long
  local seconds=$1 start=$SECONDS status=0
  shift
  timeout --kill-after=15 "$seconds" "$@" || status=$?
  echo "== exit $status after $((SECONDS - start)) s$([ $status = 124 ] && echo " (its limit)"): ${*:0:6}"
  return $status
}

ranks() { # seconds, program and its options
  local seconds=$1
  shift
  limited "$seconds" "$python" -m torch.distributed.run --standalone --nproc_per_node=2 "$@"
}

smoke() { ranks 60 tests/gpu2_smoke.py; }

tests() {
  local spread=()
  "$python" -c "import xdist" 2>/dev/null && spread=(-n 3 --dist load)
  limited 300 "$python" -m pytest tests/distributed -q -p no:cacheprovider -m cuda --durations=12 "${spread[@]}" "$@"
}

bench() { ranks 200 benchmarks/gpu_parallel.py "$@"; }

"$python" -m fastmoe_cpp doctor || exit 1
nvidia-smi topo -m || true
what=${1:-all}
shift $(( $# > 0 ? 1 : 0 ))
case "$what" in
  smoke) smoke ;;
  tests) tests "$@" ;;
  bench) bench "$@" ;;
  all)
    status=0
    smoke || status=1
    tests || status=1
    bench "$@" || status=1
    exit $status
    ;;
  *)
    sed -n '2,7s/^# *//p' "$0" >&2
    exit 2
    ;;
esac
