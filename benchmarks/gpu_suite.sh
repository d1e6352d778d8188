#!/usr/bin/env bash
# Everything a GPU can tell, without network, in one command of nine minutes, or in parts:
#   OUT=folder benchmarks/gpu_suite.sh                       all parts, in this order
#   OUT=folder benchmarks/gpu_suite.sh check                 build in place, tests, sanitizers
#   OUT=folder benchmarks/gpu_suite.sh tune                  best tiles: rewrites the table of configurations
#   OUT=folder benchmarks/gpu_suite.sh report [stages]       figures (stages of gpu_report.py, comma-separated)
# Needs torch with CUDA, triton, pybind11, pytest and nvcc; uses pytest-xdist where it is installed. Each stage has a time
# limit; a failed one does not stop the rest, but the script's exit status is the number of failed stages. The report
# has what is left of SECONDS_IN_ALL (540). OUT gets a log of each part, gpu.json, tune.json and the new configs.py.
set -u
cd "$(dirname "$0")/.."
PART=${1:-all}
OUT=${OUT:-benchmarks/results/gpu}
SECONDS_IN_ALL=${SECONDS_IN_ALL:-540}
mkdir -p "$OUT"
: >"$OUT/$PART.log"
failed=0
stage() {  # name, seconds, command...
    local name=$1 limit=$2 log
    shift 2
    log=$(mktemp)
    echo "== $name" | tee -a "$OUT/$PART.log"
    if ! timeout "$limit" "$@" >"$log" 2>&1; then
        failed=$((failed + 1))
        echo "FAILED: $name" | tee -a "$log"
    fi
    cat "$log" >>"$OUT/$PART.log"
    tail -n "${LINES_SHOWN:-15}" "$log"
    rm "$log"
}
# `python` has snmf_interp, which some test modules import.
export PYTHONPATH=$PWD:$PWD/python:$PWD/tests${PYTHONPATH:+:$PYTHONPATH}

build() {
    stage build 60 env SNMF_CUDA=1 python3 setup.py build_ext --inplace
    stage facts 15 python3 -m snmf_kernels
}

check() {
    local workers=()
    python3 -c "import xdist" 2>/dev/null && workers=(-n 12)
    stage context 25 python3 -m pytest -q -m gpu tests/test_cuda_context.py -p no:cacheprovider
    # Interrupted, pytest says what has failed so far; killed, it says nothing.
    LINES_SHOWN=40 stage tests 150 timeout --foreground --signal=INT --kill-after=15 130 \
        python3 -m pytest -q -m gpu tests --ignore=tests/interp -p no:cacheprovider "${workers[@]}"
    # Once without a sanitizer, which would find Triton compiling.
    stage driver 30 python3 benchmarks/gpu_driver.py
    # torch's cache of memory would hide what is read or written beyond a tensor.
    stage memcheck 35 env PYTORCH_NO_CUDA_MEMORY_CACHING=1 \
        compute-sanitizer --tool memcheck --error-exitcode 1 python3 benchmarks/gpu_driver.py
    stage racecheck 30 compute-sanitizer --tool racecheck --error-exitcode 1 python3 benchmarks/gpu_driver.py
    stage synccheck 25 compute-sanitizer --tool synccheck --error-exitcode 1 python3 benchmarks/gpu_driver.py
}

tune() {
    LINES_SHOWN=20 stage tune 75 python3 benchmarks/gpu_tune.py --out "$OUT" --seconds 55 --write
}

report() {
    local left=$((SECONDS_IN_ALL - SECONDS)) stages=()
    [ -n "$1" ] && stages=(--stages "$1")
    # A row that has been begun when its time is up is still ended.
    LINES_SHOWN=250 stage report "$left" \
        python3 benchmarks/gpu_report.py --out "$OUT" --seconds $((left - 30)) "${stages[@]}"
}

case $PART in
    all)
        build
        check
        tune
        report ""
        ;;
    check | tune)
        build
        $PART
        ;;
    report)
        build
        report "${2:-}"
        ;;
    *)
        echo "wanted check, tune, report or nothing, got $PART" >&2
        exit 2
        ;;
esac
exit "$failed"
