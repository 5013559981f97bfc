#!/usr/bin/env bash
# Fetches every data set and every network's ImageNet weights, for machines that train offline.
# Skips what is ready. Reports what is unavailable and continues; the exit code is then 1.
# Flags go to main.py, e.g. scripts/prepare.sh --data_dir /scratch/tfds
here="$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)"
python="$here/../.venv/bin/python"
[ -x "$python" ] || python=python3
names() { (cd "$here/.." && "$python" -c "$1"); }
failed=0
for dataset in $(names 'from data import DATASETS; print(*(name for name, row in DATASETS.items() if row.tfds))'); do
    "$python" "$here/../main.py" --prepare_only --dataset_name "$dataset" "$@" --weights none || failed=1
done
for model in $(names 'from models import BACKBONES; print(*BACKBONES)'); do
    "$python" "$here/../main.py" --prepare_only --model_name "$model" --input_size 224 "$@" --weights imagenet || failed=1
done
exit $failed
