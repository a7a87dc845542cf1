#!/usr/bin/env bash
# Check and measure the Triton kernels on a GPU: correctness, times, and profiles by `ncu`.
#
#   benchmarks/gpu.sh [MINUTES] [OUT]
#
# MINUTES  time limit (default: 10); steps that would exceed it are skipped and listed. Give half a minute
#          less than the limit at which the script is killed
# OUT      folder for the results (default: benchmarks/results)
# STEPS=   some of: cells kernels hosts blocks networks ncu compiled (default: all, in this order)
#
# Needs torch with CUDA and its Triton, pytest, torchvision and timm; optionally `ncu`. No internet access.
# If the kernels fail the correctness checks, times are marked "unverified", and no ratios are measured.
# Exit codes: 0 all agreed, 1 a check or a step failed, 75 something was skipped for lack of time.
#
# COMMIT=   commit of this code, if it is not a git checkout
# PYTHON=   python3
# DRY=1     no GPU: Triton's interpreter and tiny sizes, to test the script itself
set -eu
cd "$(dirname "$0")/.."
export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}"
if [ -n "${DRY:-}" ]; then export TRITON_INTERPRET=1; fi
exec "${PYTHON:-python3}" -m benchmarks.gpu --minutes "${1:-10}" --out "${2:-benchmarks/results}" ${DRY:+--dry} \
    ${COMMIT:+--commit "$COMMIT"} ${STEPS:+--steps $STEPS}
