#!/usr/bin/env bash
# Fill the studies that docs/evidence.md reports, on one GPU, as far as the time reaches.
#
#   benchmarks/gpu_studies.sh DATA [MINUTES] [OUT]
#   STUDIES="coco voc" benchmarks/gpu_studies.sh BOXES [MINUTES] [OUT]
#
# DATA     imagenette96 with train/ and val/, or the .zip that holds it
# BOXES    pictures with boxes: a folder of Pascal VOC, such as BCCD, or for the study coco alone one of COCO; or
#          the .zip that holds it
# MINUTES  the time there is (default: 25); no run is begun that would not end in it
# OUT      where the records go (default: results); what has a record there is not repeated. A place for plain
#          names alone takes them packed, `tar czf`: names such as resnet18+cbam have a "+"
#
# The same command goes on where it stopped. It needs no network: torch, torchvision and pytorch-lightning.
# Exit codes: 0 all is there, 75 the time was over before, else what went wrong.
#
# JOBS=3     processes that share the GPU: a small network leaves most of it idle
# SEEDS=5    repetitions of every row
# EPOCHS=    instead of the usual 40
# STUDIES=   instead of networks channel spatial order peers start; coco and voc are those of detectors
# COMMIT=    of what this code is a copy, where git cannot say; else the runs do not count
# DEVICE=    cuda; cpu to try the script
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
    # The last to end finds all records, if all are there; 75 of the others is what was still with it.
    [ "$own" -eq 0 ] && [ "$code" -eq 75 ] && code=0
    [ "$own" -ne 0 ] && [ "$own" -ne 75 ] && code=$own
done
pids=()
exit "$code"
