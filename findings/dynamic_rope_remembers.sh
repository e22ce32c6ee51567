#!/usr/bin/env bash
# transformers 5.19.0: with dynamic rope scaling the logits of one input depend on what the model has seen before it.
#
# A sequence longer than the model's original positions sets the frequencies for its length, and they stay until one
# shorter than the original positions comes. One in between is computed with those of the longest so far: twice the
# same call, without a cache, gives other logits after a longer call.
#
# Exit code 0: seen as described; 1: the behaviour has changed.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q torch==2.13.0 transformers==5.19.0
"$folder/venv/bin/python" - <<'PYTHON'
import sys
import torch
import transformers
from transformers import LlamaConfig, LlamaForCausalLM

torch.manual_seed(0)
sizes = dict(vocab_size=64, hidden_size=64, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4)
rope = dict(rope_type="dynamic", factor=4.0, rope_theta=10_000.0)
model = LlamaForCausalLM(LlamaConfig(**sizes, max_position_embeddings=32, rope_parameters=rope)).eval()
text, longer, short = (torch.randint(0, 64, (1, n)) for n in (48, 120, 20))


@torch.no_grad()
def logits(ids):
    return model(ids, use_cache=False).logits


first, again = logits(text), logits(text)
logits(longer)
after_longer = logits(text)
logits(short)
after_short = logits(text)
gaps = [(first - x).abs().max().item() for x in (again, after_longer, after_short)]
print("transformers", transformers.__version__, "torch", torch.__version__)
print("largest difference of the logits of 48 tokens from those of the first call:")
print("  called again:", gaps[0])
print("  called after 120 tokens:", gaps[1])
print("  called after 20 tokens:", gaps[2])
sys.exit(not (gaps[0] == gaps[2] == 0 and gaps[1] > 1e-4))
PYTHON
