#!/usr/bin/env bash
# datasets 5.2.0 (pyarrow 26.0.1): integers of a JSON file lose digits without a word where one integer of the column has more
# than 64 bits, or where one number of the column is a fraction.
#
# The column becomes float64. With 2**64 + 1 in it that is plain to see; with 0.5 in it 9007199254740993 is read as
# 9007199254740992.0, another integer. json.loads keeps both. A gold answer that is read so equals no exact answer.
#
# Exit code 0: seen as described; 1: the behaviour has changed.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q datasets==5.2.0 pyarrow==26.0.1
cat > "$folder/see.py" <<'PY'
import json
import sys

import datasets


def read(name, values):
    path = sys.argv[1] + f"/{name}.jsonl"
    with open(path, "w") as f:
        f.writelines(json.dumps({"answer": value}) + "\n" for value in values)
    return datasets.load_dataset("json", data_files=path, split="train", cache_dir=sys.argv[1] + "/cache")["answer"][:]


fraction, large = read("fraction", [9007199254740993, 0.5]), read("large", [18446744073709551617, 9007199254740993])
alone = read("alone", [9007199254740993])
print(f"datasets {datasets.__version__}: 9007199254740993 alone: {alone}; with 0.5: {fraction}")
print(f"  with 18446744073709551617 before it: {large}")
changed = alone != [9007199254740993] or fraction != [9007199254740992.0, 0.5] or not isinstance(fraction[0], float)
sys.exit(changed or large != [18446744073709551616.0, 9007199254740992.0])
PY
cd "$folder"
HF_HOME="$folder/hf" HF_DATASETS_DISABLE_PROGRESS_BARS=1 "$folder/venv/bin/python" see.py "$folder"
