#!/usr/bin/env bash
# datasets 5.2.0 (pyarrow 26.0.1): in a column of a JSON file that holds numbers and texts, every text that happens to be JSON is
# read as what it would mean as JSON.
#
# The column becomes Json(), a type for values of several types, and its texts are parsed once more: "007" is the number 7,
# "1.50" is 1.5, "true" is a bool, "null" is missing, "[1, 2]" is a list. Without the one number in the column all of them stay
# texts. Gold answers of mathematics are such columns: nothing fails, and "007", "1.50" or "[1, 2]" cannot be told from 7, 1.5
# and a list any more. A text that is no JSON ("1/2") stays.
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

TEXTS = ["007", "1.50", "true", "null", "[1, 2]", "1/2"]


def read(values):
    path = sys.argv[1] + f"/{len(values)}.jsonl"
    with open(path, "w") as f:
        f.writelines(json.dumps({"answer": value}) + "\n" for value in values)
    return datasets.load_dataset("json", data_files=path, split="train", cache_dir=sys.argv[1] + "/cache")["answer"][:]


alone, beside_a_number = read(TEXTS), read([*TEXTS, 5])
print(f"datasets {datasets.__version__}: the texts {TEXTS}")
print(f"  alone in their column:   {alone}")
print(f"  and with the number 5:   {beside_a_number}")
sys.exit(alone != TEXTS or beside_a_number != [7, 1.5, True, None, [1, 2], "1/2", 5])
PY
cd "$folder"
HF_HOME="$folder/hf" HF_DATASETS_DISABLE_PROGRESS_BARS=1 "$folder/venv/bin/python" see.py "$folder"
