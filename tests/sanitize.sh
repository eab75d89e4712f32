#!/usr/bin/env bash
# Builds the CPU half with AddressSanitizer and UndefinedBehaviorSanitizer and runs the operators' tests under them.
#   tests/sanitize.sh [pytest arguments]        default: tests/ops and tests/regressions without torch.compile
# SANITIZE_BUILD is the folder it builds in (default build/sanitize). The exit status is 0 only if nothing was found.
set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
cd "$root"
build=${SANITIZE_BUILD:-build/sanitize}
mkdir -p "$build"
build=$(cd "$build" && pwd)
python=${PYTHON:-python}
compiler=${CXX:-c++}

# vptr would need the type information of torch's own classes.
flags="-fsanitize=address,undefined -fno-sanitize=vptr -fno-omit-frame-pointer -fno-sanitize-recover=undefined -g1"
CFLAGS="$flags" LDFLAGS="-fsanitize=address,undefined" FORCE_CUDA=0 \
  "$python" setup.py build --build-base "$build/temp" --build-lib "$build/lib" >"$build/build.log" 2>&1 ||
  { tail -n 40 "$build/build.log"; exit 2; }

libraries=
for name in libasan.so libubsan.so libstdc++.so.6; do
  libraries="$libraries $($compiler -print-file-name=$name)"
done
rm -f "$build"/report.*
# Leaks of the interpreter itself would drown ours, which tests/ops/test_memory.py counts. ASan's own intercepts raise memory
# use too much for that test, and torch.compile starts processes of its own.
export ASAN_OPTIONS="detect_leaks=0:detect_odr_violation=0:allocator_may_return_null=1:log_path=$build/report:exitcode=99"
export UBSAN_OPTIONS="print_stacktrace=1:halt_on_error=1:log_path=$build/report"
arguments=("$@")
if [ ${#arguments[@]} -eq 0 ]; then
  arguments=(tests/ops tests/regressions --ignore=tests/ops/test_memory.py --ignore=tests/ops/test_opcheck.py
             -k "not compile and not process_of_one_thread and not running_out_of_memory")
fi
# The tests import the package from the build, not from the working tree.
status=0
env LD_PRELOAD="${libraries# }" PYTHONPATH="$build/lib" PYTHONSAFEPATH=1 PYTHONMALLOC=malloc \
  "$python" -m pytest -q -p no:cacheprovider "${arguments[@]}" || status=$?
found=$(find "$build" -maxdepth 1 -name 'report.*' | wc -l)
echo "sanitizers: $found reports, tests: exit status $status"
for report in "$build"/report.*; do
  [ -e "$report" ] && head -n 60 "$report"
done
[ "$found" -eq 0 ] && [ "$status" -eq 0 ]
