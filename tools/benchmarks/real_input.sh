#!/usr/bin/env bash
# Real images and free text through the whole pipeline: pack, train with ZeRO-3 and the teacher online, evaluate, report.
#
#   bash tools/benchmarks/real_input.sh VQA_FOLDER REPORT_FOLDER [OUTPUT]
#
# The folders contain annotations.jsonl and images (see docs/datasets.md). The packaged student is far too small to answer
# radiologists' questions well. The script shows that every part runs, not the scores of a 7B student.
set -euo pipefail
cd "$(dirname "$0")/../.."
source tools/install.sh

vqa=$1 reports=$2 out=${3:-runs/real}
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}
[ -d "$out/vqa" ] || medalign shards jsonl --input "$vqa" --output "$out/vqa"
[ -d "$out/reports" ] || medalign shards jsonl --input "$reports" --output "$out/reports"

gpus=$(nvidia-smi -L 2> /dev/null | wc -l || true)
deepspeed --num_accelerators "${RANKS:-$((gpus > 0 ? gpus : 2))}" --no_local_rank --module medalign train phantom \
    --data.train "[$out/vqa/train, $out/reports/train]" --data.max_length 256 \
    --run.dir "$out/run" --train.steps "${STEPS:-300}" --train.batch_size 16 --train.micro_batch_size 8

for name in vqa reports; do
    medalign evaluate "$out/run" --data "$out/$name/test" --name "$name" --max-new-tokens 48
done
medalign report "$out/run" --output "$out/report.html"
python -m tools.benchmarks.real_input_figures "$out"
