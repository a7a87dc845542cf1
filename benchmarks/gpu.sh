#!/usr/bin/env bash
# Settle what only a GPU can: the Triton kernels' correctness, their times, and what `ncu` says of them.
#
#   benchmarks/gpu.sh [MINUTES] [OUT]
#
# MINUTES  the time there is (default: 10); what would not end in it is left out, and named. Give it half a
#          minute less than what kills the script
# OUT      where the rows go (default: benchmarks/results)
# STEPS=   some of: cells kernels hosts blocks networks ncu compiled (default: all, in this order)
#
# Needs torch with CUDA and its Triton, pytest, torchvision and timm; `ncu` where it is there. No network.
# Where the kernels do not agree, times are marked "unverified" and there are no ratios to other codes.
# Exit codes: 0 all agreed, 1 something did not or broke, 75 something was left out for want of time.
#
# COMMIT=   of what this code is a copy, where git cannot say
# PYTHON=   python3
# DRY=1     no GPU: Triton's interpreter and sizes that mean nothing, to try the script itself
set -eu
cd "$(dirname "$0")/.."
export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}"
if [ -n "${DRY:-}" ]; then export TRITON_INTERPRET=1; fi
exec "${PYTHON:-python3}" -m benchmarks.gpu --minutes "${1:-10}" --out "${2:-benchmarks/results}" ${DRY:+--dry} \
    ${COMMIT:+--commit "$COMMIT"} ${STEPS:+--steps $STEPS}
