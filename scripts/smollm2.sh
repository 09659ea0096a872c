#!/usr/bin/env bash
# SmolLM2-135M-Instruct on HH-RLHF: fetches the model, imports the comparisons, trains both reward models and PPO.
#
#   scripts/smollm2.sh PREFERENCES [OUT]
#
#   PREFERENCES   a directory with helpful-base* and harmless-base*, files or directories of the HH-RLHF data
#   OUT           default runs/smollm2
#   HUB=1         take the model from the hub instead of from a Python package
#   SET='--set ppo.num_steps=2 ...'   more settings
set -euo pipefail
cd "$(dirname "$0")/.."
preferences=${1:?give the directory of the preference data: make smollm2 PREFERENCES=DIR}
out=${2:-runs/smollm2}
data=$out/data model=$out/smollm2-135m-instruct
rlhf_ray=.venv/bin/rlhf-ray

.venv/bin/python scripts/fetch_smollm2.py "$model" ${HUB:+--hub}

# A quarter of the prompts is held out from all training, by a hash of a dialogue's first message: hashes below 0.05 are for
# the evaluation, those up to 0.1 for early stopping. Dialogues longer than reward.max_length lose their oldest turns.
split=(--held-out 0.25 --max-tokens 112 --tokenizer "$model" --too-long drop-turns)
test_share=0.05 early_stop_share=0.1
made="$preferences ${split[*]} $test_share $early_stop_share"
if [[ $(cat "$data/done" 2> /dev/null) != "$made" ]]; then
    rm -f "$data/done"
    $rlhf_ray data import "$preferences"/helpful-base* --to "$data/helpful.parquet" --kind comparisons \
        --guideline helpfulness "${split[@]}" --overwrite
    $rlhf_ray data import "$preferences"/harmless-base* --to "$data/harmless.parquet" --kind comparisons \
        --guideline safety "${split[@]}" --overwrite
    both=("$data/helpful.parquet" "$data/harmless.parquet")
    $rlhf_ray data import "${both[@]}" --to "$data/comparisons.parquet" --kind comparisons --overwrite
    $rlhf_ray data import "${both[@]}" --to "$data/prompts_train.parquet" --kind prompts --overwrite
    held_out=("$data/helpful.held_out.parquet" "$data/harmless.held_out.parquet")
    $rlhf_ray data import "${held_out[@]}" --to "$data/comparisons_held_out.parquet" --kind comparisons --overwrite
    $rlhf_ray data import "${held_out[@]}" --to "$data/rest.parquet" --kind prompts --held-out $test_share --overwrite
    mv "$data/rest.held_out.parquet" "$data/prompts_test.parquet"
    $rlhf_ray data import "$data/rest.parquet" --to "$data/unused.parquet" --kind prompts --held-out $early_stop_share \
        --overwrite
    mv "$data/unused.held_out.parquet" "$data/prompts_early_stop.parquet"
    echo "$made" > "$data/done"
fi

# shellcheck disable=SC2086  # SET holds several words
$rlhf_ray run configs/smollm2.toml --out "$out" --set inputs.chat="$model" \
    --set data.comparisons="$data/comparisons.parquet" \
    --set data.comparisons_held_out="$data/comparisons_held_out.parquet" \
    --set data.prompts_train="$data/prompts_train.parquet" \
    --set data.prompts_early_stop="$data/prompts_early_stop.parquet" \
    --set data.prompts_test="$data/prompts_test.parquet" ${SET:-}
