#!/usr/bin/env bash
# Run the studies that docs/evidence.md reports on one GPU, as far as the time allows.
#
#   benchmarks/gpu_studies.sh DATA [MINUTES] [OUT]
#   STUDIES="coco voc" benchmarks/gpu_studies.sh BOXES [MINUTES] [OUT]
#
# DATA     imagenette96 with train/ and val/, or a .zip of it
# BOXES    images with boxes: a Pascal VOC folder, such as BCCD, or for the study coco only, a COCO folder; or a
#          .zip of it
# MINUTES  time limit (default: 25); runs that would exceed it are not started
# OUT      folder for the records (default: results); runs with a record there are not repeated. If the target
#          system rejects a "+" in file names, as in resnet18+cbam, pack the records with `tar czf`
#
# The same command resumes. It needs torch, torchvision and pytorch-lightning, but no internet access.
# Exit codes: 0 complete, 75 out of time, otherwise that of the failure.
#
# JOBS=3     processes that share the GPU: a small network leaves most of it idle
# SEEDS=5    repetitions of every row
# EPOCHS=    instead of the usual 40
# STUDIES=   instead of networks channel spatial order peers start; coco and voc are for detectors
# COMMIT=    commit of this code, if it is not a git checkout; without it the runs do not count
# DEVICE=    cuda; cpu to test the script
# MORE=      further options of `cbam study`
# PYTHON=    python3
set -u
cd "$(dirname "$0")/.."
data=${1:?usage: benchmarks/gpu_studies.sh DATA [MINUTES] [OUT]}
end=$((SECONDS + ${2:-25} * 60))
out=${3:-results}
python=${PYTHON:-python3}
options=(--device "${DEVICE:-cuda}" --seeds "${SEEDS:-5}" --out "$out")
[ -n "${EPOCHS:-}" ] && options+=(--epochs "$EPOCHS")
[ -n "${COMMIT:-}" ] && options+=(--commit "$COMMIT")
# shellcheck disable=SC2206
options+=(${MORE:-})
export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}" OMP_NUM_THREADS="${OMP_NUM_THREADS:-4}"

pids=()
unpacked=
finish() {
    for pid in "${pids[@]}"; do kill -TERM "$pid" 2>/dev/null; done
    wait
    [ -n "$unpacked" ] && rm -rf "$unpacked"
}
trap finish EXIT
trap 'exit 130' INT
trap 'exit 143' TERM

case $data in
*.zip)
    unpacked=$(mktemp -d)
    "$python" -m zipfile -e "$data" "$unpacked" || exit 3
    found=$(find "$unpacked" -type d \( -name train -o -name ImageSets -o -name annotations \) | head -1)
    [ -n "$found" ] || { echo "no train/, ImageSets/ or annotations/ in $1" >&2; exit 3; }
    data=$(dirname "$found")
    ;;
esac

for job in $(seq "${JOBS:-3}"); do
    # shellcheck disable=SC2086
    "$python" -m cbam study ${STUDIES:-networks channel spatial order peers start} --dataset "$data" \
        --budget "$((end - SECONDS))s" "${options[@]}" > >(sed -u "s/^/$job: /") 2>&1 &
    pids+=($!)
done

code=75
for pid in "${pids[@]}"; do
    wait "$pid"
    own=$?
    # The last process to end sees all records. The others exit with 75 if it still had runs to finish.
    [ "$own" -eq 0 ] && [ "$code" -eq 75 ] && code=0
    [ "$own" -ne 0 ] && [ "$own" -ne 75 ] && code=$own
done
pids=()
exit "$code"
