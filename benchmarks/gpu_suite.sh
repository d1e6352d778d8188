#!/usr/bin/env bash
# Everything a GPU can tell, without network, in one command, or in parts where commands may take ten minutes only:
#   OUT=folder benchmarks/gpu_suite.sh                       both parts
#   OUT=folder benchmarks/gpu_suite.sh check                 build in place, tests, sanitizers
#   OUT=folder benchmarks/gpu_suite.sh report [stages]       figures (stages of gpu_report.py, comma-separated)
# Needs torch with CUDA, triton, pybind11, pytest and nvcc; uses pytest-xdist where it is installed. Each stage has a time
# limit; a failed one does not stop the rest, but the script's exit status is the number of failed stages. OUT gets a
# log of each command, and gpu.json.
set -u
cd "$(dirname "$0")/.."
PART=${1:-all}
OUT=${OUT:-benchmarks/results/gpu}
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

check() {
    local workers=()
    python3 -c "import xdist" 2>/dev/null && workers=(-n 12)
    stage build 90 env SNMF_CUDA=1 python3 setup.py build_ext --inplace
    stage facts 20 python3 -m snmf_kernels
    stage context 40 python3 -m pytest -q -m gpu tests/test_cuda_context.py -p no:cacheprovider
    stage tests 270 python3 -m pytest -q -m gpu tests --ignore=tests/interp -p no:cacheprovider "${workers[@]}"
    # Once without a sanitizer, which would find Triton compiling.
    stage driver 40 python3 benchmarks/gpu_driver.py
    # torch's cache of memory would hide what is read or written beyond a tensor.
    stage memcheck 45 env PYTORCH_NO_CUDA_MEMORY_CACHING=1 \
        compute-sanitizer --tool memcheck --error-exitcode 1 python3 benchmarks/gpu_driver.py
    stage racecheck 40 compute-sanitizer --tool racecheck --error-exitcode 1 python3 benchmarks/gpu_driver.py
    stage synccheck 30 compute-sanitizer --tool synccheck --error-exitcode 1 python3 benchmarks/gpu_driver.py
}

report() {
    local stages=${1:-floors,update,descent,products,pass,columns,select,solve,fit,many}
    stage build 90 env SNMF_CUDA=1 python3 setup.py build_ext --inplace
    LINES_SHOWN=60 stage report 480 python3 benchmarks/gpu_report.py --out "$OUT" --stages "$stages"
}

case $PART in
    all)
        check
        report ""
        ;;
    check) check ;;
    report) report "${2:-}" ;;
    *)
        echo "wanted check, report or nothing, got $PART" >&2
        exit 2
        ;;
esac
exit "$failed"
