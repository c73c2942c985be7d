#!/usr/bin/env bash
# Train exits for a model. The steps: training text that the model writes, adapters, drafter, confidence estimators,
# evaluation, calibration. The page can load the result. If the run is interrupted, start it again: it continues.
#
#   MODEL=./my-llama OUT=runs/my-llama training/run.sh
#   SMOKE=1 training/run.sh                        # a tiny random model on a CPU, in about a minute
#
#   variable  meaning                                          default
#   MODEL     bundled name, Hub id or local folder             smollm2-135m-instruct
#   OUT       folder for data, checkpoints and exits           runs/MODEL
#   EXITS     layers, or shares of the depth                   0,0.3,0.57,0.8
#   TOKENS    tokens of training text that the model writes    2000000
#   PROMPTS   JSONL files with rows {"prompt": ...}, separated by spaces: user turns that the model answers
#   TEXTS     text files, separated by spaces: passages that the model continues, and plain training text
#   PROCESSES number of training processes or GPUs             1
#   DISTILL, DRAFTER, CONFIDENCE   more options for these steps
set -euo pipefail
project=$(cd "$(dirname "$0")/.." && pwd)
# `training` is found from any working folder, and a folder of that name there does not hide it.
export PYTHONPATH=$project${PYTHONPATH:+:$PYTHONPATH} PYTHONSAFEPATH=1

python=${PYTHON:-python}
MODEL=${MODEL:-smollm2-135m-instruct}
OUT=${OUT:-runs/$(basename "$MODEL")}
TOKENS=${TOKENS:-2000000}
read -ra prompts <<< "${PROMPTS:-}"
read -ra texts <<< "${TEXTS:-}"
read -ra distill <<< "${DISTILL:-}"
read -ra drafter <<< "${DRAFTER:-}"
read -ra confidence <<< "${CONFIDENCE:-}"
policy=(--tokens "$TOKENS")
evaluate=(--tokens 100000)
calibrate=()

if [[ ${SMOKE:-} ]]; then
  OUT=${SMOKE_OUT:-runs/smoke}
  MODEL=$OUT/model
  [[ -f $MODEL/config.json ]] || $python -m training.tiny --out "$MODEL"
  texts=("$project/training/smoke_text.txt")
  policy=(--tokens 24000 --batch 32 --steps 96)
  distill=(--epochs 1 --batch 512 --width 32 --head-size 256 --train-words 128 --tail 64 --save-every 20)
  drafter=(--epochs 3 --batch 256 --lr 2e-3 --tail 64 --save-every 40)
  confidence=(--epochs 1 --calibration-epochs 2 --width 16)
  calibrate=(--prompts 4 --tokens 8 --thresholds 0.9 0.5)
fi

say() { printf '\n== %s\n' "$*"; }

say "1. text that $MODEL writes"
data=("$OUT/data/policy")
$python -m training.data policy --model "$MODEL" --out "${data[0]}" "${policy[@]}" \
  ${prompts[0]:+--prompts "${prompts[@]}"} ${texts[0]:+--texts "${texts[@]}"}
if [[ ${texts[0]:-} ]]; then
  data+=("$OUT/data/text")
  $python -m training.data text --model "$MODEL" --files "${texts[@]}" --out "${data[1]}"
fi

say "2. adapters"
launch=("$python")
if [[ ${PROCESSES:-1} -gt 1 ]]; then
  launch=("$python" -m torch.distributed.run --nproc-per-node "$PROCESSES")
fi
"${launch[@]}" -m training.distill --model "$MODEL" --data "${data[@]}" --out "$OUT/exits" \
  ${EXITS:+--exits "$EXITS"} "${distill[@]}"

# A drafter starts as the `carry` exit before the first layer. Without one, `verified` still works, but slower.
if [[ ${EXITS:-0,} == 0,* && "${distill[*]}" != *swiglu* && "${distill[*]}" != *published* ]]; then
  say "3. drafter"
  "${launch[@]}" -m training.drafter --model "$MODEL" --exits "$OUT/exits" --data "${data[@]}" "${drafter[@]}"
fi

say "4. confidence estimators"
$python -m training.confidence --model "$MODEL" --exits "$OUT/exits" --data "${data[@]}" "${confidence[@]}"

say "5. evaluation"
$python -m training.evaluate exits --model "$MODEL" --exits "$OUT/exits" --data "${data[@]}" "${evaluate[@]}" \
  --out "$OUT/exits/evaluation.json"

say "6. calibration of the quality slider"
$python -m training.calibrate --model "$MODEL" --exits "$OUT/exits" --data "${data[@]}" "${calibrate[@]}"

say "done: ${PAGE:-python app.py} --model $MODEL --exits $OUT/exits"
