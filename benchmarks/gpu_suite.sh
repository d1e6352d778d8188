#!/usr/bin/env bash
# Everything a GPU can tell, in one command and without network: build in place, tests, sanitizer, figures.
#   OUT=folder benchmarks/gpu_suite.sh [stages of gpu_report.py, comma-separated]
# Needs torch with CUDA, triton, pybind11, pytest and nvcc. Each stage has a time limit; a failed one does not stop the rest,
# but the script's exit status is the number of failed stages.
set -u
cd "$(dirname "$0")/.."
OUT=${OUT:-benchmarks/results/gpu}
STAGES=${1:-floors,update,descent,products,pass,columns,select,solve,fit,many}
mkdir -p "$OUT"
failed=0
stage() {  # name, seconds, command...
    local name=$1 limit=$2
    shift 2
    echo "== $name"
    if ! timeout "$limit" "$@" >"$OUT/$name.log" 2>&1; then
        failed=$((failed + 1))
        echo "FAILED: $name"
    fi
    tail -n "${LINES_SHOWN:-15}" "$OUT/$name.log"
}

stage build 120 env SNMF_CUDA=1 python3 setup.py build_ext --inplace
export PYTHONPATH=$PWD:$PWD/tests${PYTHONPATH:+:$PYTHONPATH}
stage facts 60 python3 -m snmf_kernels
stage context 60 python3 -m pytest -q -m gpu tests/test_cuda_context.py -p no:cacheprovider
stage tests 240 python3 -m pytest -q -m gpu tests --ignore=tests/interp -p no:cacheprovider
for tool in memcheck racecheck synccheck; do
    stage "$tool" 120 compute-sanitizer --tool "$tool" --error-exitcode 1 python3 benchmarks/gpu_driver.py
done
LINES_SHOWN=60 stage report 480 python3 benchmarks/gpu_report.py --out "$OUT" --stages "$STAGES"
exit "$failed"
