#!/usr/bin/env bash
# Settle what only a GPU can: the Triton kernels' correctness, their times, and what `ncu` says of them.
#
#   benchmarks/gpu.sh [MINUTES] [OUT]
#
# MINUTES  the time there is (default: 10); what would begin after it is left out, and named
# OUT      where the rows go (default: benchmarks/results)
# STEPS=   some of: cells kernels hosts blocks networks ncu compiled (default: all, in this order)
#
# Needs torch with CUDA and its Triton, pytest, torchvision and timm; `ncu` where it is there. No network.
# Exit codes: 0 all agreed, 1 something did not, 75 the time was over before the end.
#
# PYTHON=   python3
# DRY=1     no GPU: Triton's interpreter and sizes that mean nothing, to try the script itself
set -eu
cd "$(dirname "$0")/.."
export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}"
if [ -n "${DRY:-}" ]; then export TRITON_INTERPRET=1; fi
exec "${PYTHON:-python3}" -m benchmarks.gpu --minutes "${1:-10}" --out "${2:-benchmarks/results}" ${DRY:+--dry} \
    ${STEPS:+--steps $STEPS}
