#!/usr/bin/env bash
# Everything that needs a GPU, on a machine with one and no network, in one call of under ten minutes:
#
#     benchmarks/gpu_check.sh [COMMIT]              COMMIT: for the results, where git cannot tell
#
# builds against whatever python, torch and nvcc are there, measures the targets of the CUDA and Triton kernels side by side, runs the tests
# on the device (a marked subset under compute-sanitizer), and writes one file of rows and a table.
#
#     OUT     where they go (default benchmarks/results)
#     PYTHON  the interpreter (default: the first of .venv/bin/python, python3, python whose torch sees a GPU)
#     TOTAL   seconds for everything but the report at the end (default 540)
#     STAGES  which to run, in the order below: "cuda-tests memcheck" (default: all). On a machine that has been built on, those that the
#             first call had no time for; their file has their names, and replaces no other
#
# Stages up to the measurements take TOTAL together at most, so that these have their time whatever the build takes; tests and the rest
# share what is left, in their order. A stage that fails or runs out of its time does not stop the later ones. Rows are kept as they are
# measured: where the script itself is killed they stay in OUT/unfinished-*, and `python -m benchmarks.gpu_report` makes a report of them.
# Exit status: 0 all passed, 1 not all, 2 no GPU, or a stage that is none.
# --rehearse instead of COMMIT: no GPU needed, nothing is built, tiny sizes on the CPU; tests this script.
# shellcheck disable=SC2317,SC2329  # the stages' functions are called by name, in a bash that timeout can stop
set -uo pipefail
cd "$(dirname "$0")/.." || exit 2
TOTAL=${TOTAL:-540}
OUT=${OUT:-benchmarks/results}
rehearse=
[ "${1:-}" = --rehearse ] && rehearse=1 && shift
commit=${1:-$(git describe --always --abbrev=40 --dirty 2>/dev/null || echo unknown)}

sees_gpu='
import sys, torch
if not torch.cuda.is_available():
    sys.exit(f"torch {torch.__version__} " + ("is built without CUDA" if torch.version.cuda is None else "finds no usable GPU or driver"))
'
python=
for candidate in ${PYTHON:+"$PYTHON"} .venv/bin/python python3 python; do
  command -v "$candidate" >/dev/null || continue
  if [ -n "$rehearse" ] || why=$("$candidate" -c "$sees_gpu" 2>&1); then
    python=$(command -v "$candidate")
    break
  fi
  reasons="${reasons:-}${reasons:+; }$candidate: ${why##*$'\n'}"
  [ -n "${PYTHON:-}" ] && break
done
if [ -z "$python" ]; then
  echo "gpu_check: no GPU (${reasons:-no python found})" >&2
  exit 2
fi
export python rehearse

known=(versions build loads targets long costs cuda-tests triton-tests memcheck racecheck transactions wgmma speed others)
[ -n "$rehearse" ] && known=(versions targets long costs speed)
STAGES=${STAGES:-${known[*]}}
for name in $STAGES; do
  [[ " ${known[*]} " == *" $name "* ]] && continue
  echo "gpu_check: STAGES: '$name' is none of ${known[*]}" >&2
  exit 2
done

mkdir -p "$OUT" && work=$(mktemp -d "$(cd "$OUT" && pwd)/unfinished-XXXXXX") || exit 2
export work
: >"$work/stages.tsv"
failed=0

# NAME LIMIT COMMAND...: runs it within LIMIT seconds, and within what is left of the whole; notes how it went.
stage() {
  local name=$1 limit=$2 begin=$SECONDS code=skipped
  shift 2
  if [[ " $STAGES " != *" $name "* ]]; then
    printf '%s\tunasked\t0\t0\n' "$name" >>"$work/stages.tsv"
    return
  fi
  ((limit > TOTAL - SECONDS)) && limit=$((TOTAL - SECONDS))
  printf '\n== %s (at most %d s, %d s gone)\n' "$name" "$limit" "$SECONDS"
  if ((limit >= 5)); then
    timeout -s INT -k 10 "$limit" "$@" 2>&1 | tee "$work/$name.log"
    code=${PIPESTATUS[0]}
  fi
  [ "$code" = 0 ] || failed=1
  printf '%s\t%s\t%d\t%d\n' "$name" "$code" $((SECONDS - begin)) "$limit" >>"$work/stages.tsv"
  printf '== %s: exit status %s after %d s\n' "$name" "$code" $((SECONDS - begin))
}

versions() {
  nvidia-smi --query-gpu=name,driver_version,memory.total,compute_cap,clocks.max.sm --format=csv 2>&1 | head -3
  nvcc --version 2>&1 | tail -2
  for tool in cmake ninja g++; do "$tool" --version 2>&1 | head -1; done
  "$python" -c '
import platform, sys, torch
print("python", platform.python_version(), sys.executable)
print("torch", torch.__version__, "cuda", torch.version.cuda, "cudnn", torch.backends.cudnn.version())
for name in ("triton", "pybind11", "setuptools", "pytest", "flashrnn", "haste_pytorch"):
    try:
        print(name, getattr(__import__(name), "__version__", "present"))
    except Exception as error:
        print(name, "absent:", type(error).__name__, str(error)[:80])
'
}

# For the one GPU that is here: all architectures would take minutes more. Editable, so that the tree's own package is what runs.
build() {
  local capability arch
  capability=$(nvidia-smi --query-gpu=compute_cap --format=csv,noheader 2>/dev/null | head -1 | tr -d '. ')
  [ -n "$capability" ] || capability=$("$python" -c 'import torch; print("%d%d" % torch.cuda.get_device_capability())')
  case $capability in 90) arch=90a-real ;; *) arch=$capability-real ;; esac
  export STABLE_RNN_CUDA=on STABLE_RNN_CUDA_ARCHS=$arch
  echo "architecture $arch"
  "$python" -m pip install --quiet --no-build-isolation --no-deps --no-index -e . && return
  echo "pip failed; cmake directly"
  local generator=()
  command -v ninja >/dev/null && generator=(-G Ninja)
  cmake -S . -B "$work/build" "${generator[@]}" -DCMAKE_BUILD_TYPE=Release -DSTABLE_RNN_CUDA=ON -DSTABLE_RNN_CUDA_ARCHS="$arch" \
    -DPython_EXECUTABLE="$python" -Dpybind11_DIR="$("$python" -m pybind11 --cmakedir)" \
    -DCMAKE_LIBRARY_OUTPUT_DIRECTORY="$PWD/stable_rnn" && cmake --build "$work/build" -j
}

# Loads on the device, and both streams and graphs of torch work beside the module's own static CUDA runtime.
loads() {
  "$python" -m stable_rnn.cli doctor || return
  "$python" -c '
import torch
from stable_rnn import StableLSTM, Windowed, backends
assert next(b for b in backends() if b.name == "cuda").available, "the cuda backend does not run here"
m = StableLSTM(64, 64, plan=Windowed(8), backend="cuda").cuda().half().eval()
x = torch.randn(128, 2, 64, device="cuda", dtype=torch.float16)
side = torch.cuda.Stream()
with torch.no_grad():
    want = m(x)[0].clone()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        found = m(x)[0]
    torch.cuda.current_stream().wait_stream(side)
    assert torch.equal(found, want), "another stream, another result"
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = m(x)[0]
    captured.zero_()
    graph.replay()
    torch.cuda.synchronize()
    assert torch.equal(captured, want), "a captured graph, another result"
print("another stream and a captured graph give the same bits")
'
}

# The files whose tests run on a device where there is one; what runs in the block executor all the same, and compiling for every
# architecture, need no GPU and are tested elsewhere.
on_device="tests/test_cuda_backend.py tests/test_executor.py tests/test_step_of_products.py $(echo tests/ops/test_cuda_*.py)"
pytests() { "$python" -m pytest -q -p no:cacheprovider --maxfail=40 "$@"; }
# shellcheck disable=SC2086  # several files
cuda_tests() {
  pytests $on_device -k "(gpu or cuda_backend or cuda_projection or step_of_products) and not transactions and not wgmma"
}
# Not the default, and apart: a wait that never ends would take the others along.
transactions_tests() { pytests tests/test_executor_transactions.py tests/ops/test_cuda_recurrence_exchange.py -k "gpu and transactions"; }
wgmma_tests() { pytests tests/test_executor_warpgroups.py tests/ops/test_cuda_recurrence_wgmma.py -k gpu; }
triton_tests() { pytests tests/triton -k "not compiled"; }

# Allocations one by one, so that the ends of every tensor are watched.
# shellcheck disable=SC2086  # several files
sanitizer() {
  command -v compute-sanitizer >/dev/null || { echo "no compute-sanitizer here"; return 3; }
  PYTORCH_NO_CUDA_MEMORY_CACHING=1 compute-sanitizer --tool "$1" --error-exitcode 86 --launch-timeout 60 \
    "$python" -m pytest -q -p no:cacheprovider $on_device -m sanitizer
}

# The parts of the targets that a stage of their own measures.
later=(scans chrono training resets trained gru)
skip=(--skip=others --skip=costs --skip=exchange --skip=products "${later[@]/#/--skip=}")
only=("${later[@]/#/--only=}")
export on_device
export -f versions build loads pytests cuda_tests transactions_tests wgmma_tests triton_tests sanitizer

# NAME LIMIT ARGUMENTS...: a stage that measures targets.
measure() {
  local name=$1 limit=$2
  shift 2
  stage "$name" "$limit" "$python" -m benchmarks.gpu_targets "${quickly[@]}" --out "$work/$name" --commit "$commit" "$@"
}

stage versions 10 bash -c versions
if [ -n "$rehearse" ]; then
  quickly=(--rehearse --seconds 0.01)
  measure targets 60 "${skip[@]}"
  measure long 120 "${only[@]}"
  measure costs 30 --only=costs --only=exchange --only=products
  stage speed 60 "$python" -m benchmarks.speed --quick --devices cpu --T 64 --B 1 --H 8 --k 4 --cells lstm --seconds 0.02 \
    --out "$work/speed" --commit "$commit"
else
  quickly=(--seconds 0.5)
  stage build 170 bash -c build
  stage loads 20 bash -c loads
  measure targets 130 "${skip[@]}"
  measure long 110 "${only[@]}"
  measure costs 40 --only=costs --only=exchange --only=products
  stage cuda-tests 150 bash -c cuda_tests
  stage triton-tests 80 bash -c triton_tests
  stage memcheck 60 bash -c "sanitizer memcheck"
  stage racecheck 60 bash -c "sanitizer racecheck"
  stage transactions 40 bash -c transactions_tests
  stage wgmma 40 bash -c wgmma_tests
  stage speed 60 "$python" -m benchmarks.speed --quick --devices cuda --minutes 0.8 --out "$work/speed" --commit "$commit"
  measure others 540 --only=others
fi
if timeout 30 "$python" -m benchmarks.gpu_report "$work" "$OUT" "$commit"; then
  cut -f 1-3 "$work/stages.tsv"
  rm -rf "$work"
else
  echo "gpu_check: no report; what was measured stays in $work" >&2
  failed=1
fi
exit "$failed"
