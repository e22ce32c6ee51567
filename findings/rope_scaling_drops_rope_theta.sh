#!/usr/bin/env bash
# transformers 5.19.0: rope_scaling, written into a config.json that transformers 5 saved, resets rope_theta to 10,000.
#
# transformers 5 saves rope_theta inside of "rope_parameters". Model cards say: to read long texts, add a "rope_scaling"
# to config.json. That one then replaces rope_parameters as a whole, and a model with theta 1,000,000 is computed
# with 10,000, without a word. With rope_theta at the top level, as transformers 4 saved it, theta is kept.
#
# Exit code 0: seen as described; 1: the behaviour has changed.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q transformers==5.19.0
"$folder/venv/bin/python" - "$folder/model" <<'PYTHON'
import json, sys
from pathlib import Path
import transformers
from transformers import AutoConfig, Qwen2Config

file = Path(sys.argv[1], "config.json")
theta = dict(rope_type="default", rope_theta=1_000_000.0)
Qwen2Config(num_hidden_layers=1, max_position_embeddings=32768, rope_parameters=theta).save_pretrained(file.parent)
saved = json.loads(file.read_text())
yarn = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768}


def theta_of(**changes):
    file.write_text(json.dumps({k: v for k, v in (saved | changes).items() if v is not None}))
    return AutoConfig.from_pretrained(file.parent).rope_parameters["rope_theta"]


found = theta_of(), theta_of(rope_scaling=yarn), theta_of(rope_scaling=yarn, rope_parameters=None, rope_theta=1e6)
print("transformers", transformers.__version__)
print("rope_theta as saved:", found[0])
print("with rope_scaling added, as model cards say:", found[1])
print("the same in a config.json of transformers 4:", found[2])
sys.exit(found != (1e6, 1e4, 1e6))
PYTHON
