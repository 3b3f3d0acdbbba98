#!/usr/bin/env bash
# Everything there is to learn from a GPU, in three stages of at most nine minutes each, most important work first:
#
#   benchmarks/gpu_acceptance.sh check      build, tests on the device, compute-sanitizer, launch counts, CUDA graphs
#   benchmarks/gpu_acceptance.sh bench      our steps beside their peers, predictions beside measurements
#   benchmarks/gpu_acceptance.sh profile    time by kernel, ncu figures of the hottest
#
# --dry-run rehearses a stage without a GPU: the same steps on small shapes on the CPU, with the tools that need a GPU
# named but not run. Needs a CUDA build of torch (2.11 or newer), nvcc, cmake, ninja, pybind11, pytest, hypothesis; no
# network. The stages share one build. Ends with status 1 if a step failed; what was cut off for want of time is named.
#
#   PYTHON                          the Python to use (python3)
#   ILVAE_FAST_ACCEPTANCE           where logs and JSON go (runs/gpu_acceptance), a folder and a .tar.gz of it for a stage
#   ILVAE_FAST_STAGE_SECONDS        the time of a stage (530)
#   ILVAE_FAST_COMMIT               the commit, for results, where the tree is no git checkout
#   ILVAE_FAST_CUDA_ARCHITECTURES   what to build for (what a default build has)
set -uo pipefail
cd "$(dirname "$0")/.." || exit 2

usage() {
  sed -n '2,16p' "$0" | sed 's/^# \{0,1\}//' >&2
  exit 2
}

stage=${1:-}
dry_run=
case "${2:-}" in
  --dry-run) dry_run=yes ;;
  "") ;;
  *) usage ;;
esac
case "$stage" in check | bench | profile) ;; *) usage ;; esac

python=${PYTHON:-python3}
out=${ILVAE_FAST_ACCEPTANCE:-runs/gpu_acceptance}/$stage
deadline=$((SECONDS + ${ILVAE_FAST_STAGE_SECONDS:-530}))
device=cuda
[ -n "$dry_run" ] && device=cpu
mkdir -p "$out"
: >"$out/steps.tsv"

record() { # NAME STATUS SECONDS COMMAND
  printf '%s\t%s\t%s\t%s\n' "$1" "$2" "$3" "$(tr '\n\t' '  ' <<<"$4")" >>"$out/steps.tsv"
}

# step NAME SECONDS COMMAND...: runs a command for at most so long and not beyond the stage's end; output in NAME.log.
step() {
  local name=$1 limit=$2 left=$((deadline - SECONDS)) start=$SECONDS status=ok code
  shift 2
  if [ "$left" -lt 5 ]; then
    record "$name" "cut off" 0 "$*"
    printf '== %s: CUT OFF, no time left\n' "$name"
    return 1
  fi
  [ "$limit" -gt "$left" ] && limit=$left
  printf '== %s (at most %s s)\n' "$name" "$limit"
  # an interrupt, on which pytest still reports what failed before
  timeout --signal=INT --kill-after=20 "$limit" "$@" >"$out/$name.log" 2>&1
  code=$?
  case $code in
    0) ;;
    124 | 137)
      status="cut off"
      grep -qE '^(FAILED|ERROR) |[0-9]+ failed' "$out/$name.log" && status=failed
      ;;
    *) status=failed ;;
  esac
  tail -n 25 "$out/$name.log"
  record "$name" "$status" $((SECONDS - start)) "$*"
  [ "$status" = ok ] || printf '== %s: %s\n' "$name" "$status"
  [ "$status" = ok ]
}

# As step, for what makes no sense without a GPU.
gpu_step() {
  if [ -n "$dry_run" ]; then
    printf '== %s: rehearsal, would run: %s\n' "$1" "${*:3}"
    record "$1" rehearsed 0 "${*:3}"
  else
    step "$@"
  fi
}

# As gpu_step, for a tool that may not be installed.
tool_step() {
  if [ -z "$dry_run" ] && ! command -v "$3" >/dev/null; then
    printf '== %s: MISSING, %s is not installed\n' "$1" "$3"
    record "$1" missing 0 "${*:3}"
  else
    gpu_step "$@"
  fi
}

build() {
  nvidia-smi || true
  # as shipped: other architectures are other machine code
  cmake -S . -B build/acceptance -G Ninja -DPython_EXECUTABLE="$(command -v "$python")" -DILVAE_FAST_CUDA=on \
    ${ILVAE_FAST_CUDA_ARCHITECTURES:+-DILVAE_FAST_CUDA_ARCHITECTURES="$ILVAE_FAST_CUDA_ARCHITECTURES"} &&
    cmake --build build/acceptance && cmake --install build/acceptance --prefix "$PWD/ilvae_fast"
}
export -f build
export python PYTHONPATH=".${PYTHONPATH:+:$PYTHONPATH}" ILVAE_FAST_TEST_DEVICE=$device

# finish STATUS: what was done, on the screen and in one file; ends with STATUS, or with that of the steps.
finish() {
  local status=$1
  "$python" -m benchmarks.gpu summary "$out" || status=1
  tar -czf "$out.tar.gz" -C "$(dirname "$out")" "$stage"
  exit "$status"
}

pytest=("$python" -m pytest -q -p no:cacheprovider)
selection=()
[ -n "$dry_run" ] && selection=(-k "small_set or activations or transformations")
own_kernels='regex:tile_kernel|streamed_kernel|pack_kernel|reduce_kernel|up_kernel|down_kernel|turn_kernel|quadratic_kernel'

gpu_step build 520 bash -c build
if [ -z "$dry_run" ] && ! grep -q '^build	ok' "$out/steps.tsv"; then
  finish 1  # the next call goes on where ninja was interrupted
fi

case "$stage" in
  check)
    gpu_step import 60 "$python" -c 'import ilvae_fast as il; i = il.build_info(); print(i); assert i["cuda"], "built without CUDA"'
    step device_tests 260 "${pytest[@]}" tests/test_cuda_device.py tests/test_gpu.py --junitxml="$out/device_tests.xml" ${selection[@]+"${selection[@]}"}
    # without torch's pool every tensor is an allocation of its own, whose ends memcheck knows
    PYTORCH_NO_CUDA_MEMORY_CACHING=1 tool_step memcheck 120 compute-sanitizer --tool memcheck --report-api-errors no \
      --error-exitcode 9 "${pytest[@]}" tests/test_gpu.py -k small_set
    tool_step racecheck 120 compute-sanitizer --tool racecheck --error-exitcode 9 "${pytest[@]}" tests/test_gpu.py -k small_set
    ;;
  bench)
    limit=$((deadline - SECONDS - 15))
    step bench "$((limit + 10))" "$python" -m benchmarks.gpu bench "$out/bench.json" --device "$device" --seconds "$limit"
    ;;
  profile)
    step breakdown 150 "$python" -m benchmarks.gpu breakdown "$out/breakdown.json" --device "$device"
    for i in 0 1; do
      step "target$i" 60 "$python" -m benchmarks.gpu target "$i" --device "$device"
      tool_step "ncu$i" 160 ncu --clock-control none --target-processes all --kernel-name "$own_kernels" --launch-count 6 --set detailed \
        --csv --log-file "$out/ncu$i.csv" "$python" -m benchmarks.gpu target "$i"
    done
    ;;
esac

finish 0
