#!/usr/bin/env bash
# The whole pipeline: phantoms, three students trained with DeepSpeed ZeRO-3, scores on held-out films, a report.
#
#   bash tools/quickstart.sh [FOLDER]      default runs/quickstart; an existing folder is resumed
#
# SEED (0), STEPS (the recipe's), TRAIN and VAL (studies), RANKS and ARMS ("base language medalign"; two more are
# controls, "steered" and "untrained") can be set in the environment.
set -euo pipefail
cd "$(dirname "$0")/.."
source tools/install.sh

out=${1:-runs/quickstart}
seed=${SEED:-0}
gpus=$(nvidia-smi -L 2> /dev/null | wc -l || true)
if [ "$gpus" -gt 0 ]; then
    ranks=${RANKS:-$gpus}
    micro=$((32 / ranks))
    if [ "$micro" -lt 1 ]; then micro=1 ranks=32; fi
    engine=zero3
else
    ranks=${RANKS:-2} engine=cpu
    micro=$((32 / ranks))
    # Divide the cores among the ranks; sharing them slows all ranks down.
    cores=$(nproc)
    export OMP_NUM_THREADS=$((cores / ranks > 0 ? cores / ranks : 1))
fi

mkdir -p "$out"
if [ "$(cat "$out/seed" 2> /dev/null || echo "$seed")" != "$seed" ]; then
    echo "$out was started with SEED=$(cat "$out/seed"); use another folder for SEED=$seed" >&2
    exit 2
fi
echo "$seed" > "$out/seed"
if [ ! -f "$out/data/val/index.jsonl" ]; then
    medalign phantom --output "$out/data" --train "${TRAIN:-2000}" --val "${VAL:-200}" --seed "$seed" \
        --reports 0.25
fi

train() {
    local name=$1
    shift
    echo "== $name"
    deepspeed --num_accelerators "$ranks" --no_local_rank --module medalign train phantom \
        --data.train "$out/data/train" --run.dir "$out/$name" --run.seed "$seed" \
        --train.micro_batch_size "$micro" --engine.deepspeed "$engine" ${STEPS:+--train.steps "$STEPS"} "$@"
    medalign evaluate "$out/$name" --data "$out/data/val"
}

for arm in ${ARMS:-base language medalign}; do
    case $arm in
        base) train base --train.steps 0 ;;
        language) train language --losses.alpha 0 --losses.beta 0 --student.steering false ;;
        steered) train steered --losses.alpha 0 --losses.beta 0 ;; # a control: W and the language loss, no teacher
        medalign) train medalign ;;
        untrained) train untrained --teacher.random_weights_seed 1 ;; # a control: MedAlign from a teacher of noise
        *) echo "unknown arm $arm: choose from base language steered untrained medalign" >&2 && exit 2 ;;
    esac
done

runs=()
for arm in base language steered untrained medalign; do
    if [ -d "$out/$arm/evaluation" ]; then runs+=("$out/$arm"); fi
done
medalign report "${runs[@]}" --output "$out/report.html"
echo "done in $((SECONDS / 60)) min $((SECONDS % 60)) s"
