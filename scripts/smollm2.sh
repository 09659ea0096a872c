#!/usr/bin/env bash
# SmolLM2-135M-Instruct on HH-RLHF: fetches the model, imports the comparisons, trains both reward models, and with them PPO or
# a round of rejection sampling.
#
#   scripts/smollm2.sh PREFERENCES [OUT]
#
#   PREFERENCES   a directory with helpful-base* and harmless-base*: files of HH-RLHF, or its directories, as
#                 `rlhf-ray data fetch` leaves them, whose files test* are then read: 2,300 comparisons of each kind
#   OUT           default runs/smollm2
#   SPLIT=train   read train* of such directories instead: twenty times as many comparisons
#   HUB=1         take the model from the hub instead of from a Python package
#   METHOD=rejection-sampling
#                 in place of PPO; a referee learns from the comparisons that the reward models did not see
#   SET='--set ppo.num_steps=2 ...'   more settings
set -euo pipefail
cd "$(dirname "$0")/.."
preferences=${1:?give the directory of the preference data: make smollm2 PREFERENCES=DIR}
out=${2:-runs/smollm2}
data=$out/data model=$out/smollm2-135m-instruct
rlhf_ray=.venv/bin/rlhf-ray

files_of() {
    for path in "$preferences/$1"*; do
        if [[ -d $path ]]; then printf '%s\n' "$path/${SPLIT:-test}"*; else echo "$path"; fi
    done
}
mapfile -t helpful < <(files_of helpful-base)
mapfile -t harmless < <(files_of harmless-base)
if [[ ! -e ${helpful[0]} || ! -e ${harmless[0]} ]]; then
    echo "error: PREFERENCES=$preferences: must hold helpful-base* and harmless-base*, and in directories of that name" \
        "${SPLIT:-test}*; get them with \`rlhf-ray data fetch hh-rlhf --to $preferences\`" >&2
    exit 2
fi

.venv/bin/python scripts/fetch_smollm2.py "$model" ${HUB:+--hub}

# Dialogues longer than reward.max_length lose their oldest turns. A quarter is held out from all training, by a hash of the
# first message; of those the ones whose first message left has a hash below 0.1 are for the evaluation, and up to 0.15 for
# early stopping.
split=(--held-out 0.25 --max-tokens 112 --tokenizer "$model" --too-long drop-turns)
test_share=0.1 early_stop_share=0.15
made="${helpful[*]} ${harmless[*]} ${split[*]} $test_share $early_stop_share referee"
if [[ $(cat "$data/done" 2> /dev/null) != "$made" ]]; then
    rm -f "$data/done"
    $rlhf_ray data import "${helpful[@]}" --to "$data/helpful.parquet" --kind comparisons \
        --guideline helpfulness "${split[@]}" --overwrite
    $rlhf_ray data import "${harmless[@]}" --to "$data/harmless.parquet" --kind comparisons \
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
    # What neither the reward models nor the evaluation sees: the referee's.
    $rlhf_ray data import "${held_out[@]}" --to "$data/referee.parquet" --kind comparisons --held-out $early_stop_share --overwrite
    echo "$made" > "$data/done"
fi

recipe=(configs/smollm2.toml --set inputs.chat="$model")
tables=()
for table in prompts_train prompts_early_stop prompts_test; do tables+=(--set "data.$table=$data/$table.parquet"); done
comparisons=(--set data.comparisons="$data/comparisons.parquet" --set data.comparisons_held_out="$data/comparisons_held_out.parquet")
# shellcheck disable=SC2206  # SET holds several words
more=(${SET:-})

if [[ ${METHOD:-ppo} == ppo ]]; then
    $rlhf_ray run "${recipe[@]}" --out "$out" "${tables[@]}" "${comparisons[@]}" "${more[@]}"
    exit
fi
$rlhf_ray reward "${recipe[@]}" --out "$out" "${comparisons[@]}" "${more[@]}"
for name in helpfulness safety; do
    rm -rf "${out:?}/$name"
    $rlhf_ray export "$out" --model $name --to "$out/$name"
    rewards+=(--set "inputs.$name=$out/$name")
done
$rlhf_ray reward "${recipe[@]}" --out "$out/referees" --set data.comparisons="$data/referee.parquet" \
    --set inputs.safety="$out/safety" "${more[@]}"
rm -rf "$out/referee"
$rlhf_ray export "$out/referees" --model helpfulness --to "$out/referee"
$rlhf_ray run "${recipe[@]}" --out "$out" "${tables[@]}" "${rewards[@]}" --set inputs.referee="$out/referee" \
    --set 'rounds.versions=[{}]' --set 'run.stages=["rejection-sample","select","sft","evaluate"]' "${more[@]}"
