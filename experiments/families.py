"""Which model families train here? A tiny random model of each goes through train.py, on CPU or GPU.

    python experiments/families.py                  # all of them, 20 s each; the table in docs/running.md
    python experiments/families.py SmolLM3 StableLM # some of them

A run has two iterations with a large learning rate. The gap is the mean absolute difference between the
engine's and the trainer's log-probabilities of the tokens that were sampled in the second iteration, so
after training and a sync of weights (logprob_gap; rounding is 5e-7 in float32 and 1e-2 in bfloat16). If
train.py refuses a model, the table has the line that its user gets.
"""

import json
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))
from experiments import common

# isort: split
import torch
import transformers
from transformers import AutoModelForCausalLM

from tasks.arithmetic import tiny_model

SMALL = dict(
    vocab_size=32, hidden_size=128, intermediate_size=256, num_hidden_layers=2, num_attention_heads=4,
    num_key_value_heads=2, max_position_embeddings=256, pad_token_id=0, bos_token_id=1, eos_token_id=2,
    tie_word_embeddings=False,
)  # fmt: skip
HEAD, WINDOW = dict(head_dim=32), dict(sliding_window=16)  # a window that the texts outgrow
ROPE = dict(factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=64)
EXPERTS = dict(num_experts_per_tok=2)
OWN_LAYOUT = "Mistral, in its own layout beside Hugging Face's"
FAMILIES = {  # name: (configuration class, what differs from SMALL, a model of the family)
    "Llama 2": ("Llama", dict(num_key_value_heads=4), "Rho-1B, DeepSeekMath-7B"),
    "Llama 3": ("Llama", dict(rope_scaling=dict(rope_type="llama3", **ROPE)), "Llama-3.1-8B"),
    "SmolLM2": ("Llama", dict(tie_word_embeddings=True), "SmolLM2-1.7B"),
    "SmolLM3": ("SmolLM3", dict(num_hidden_layers=4), "SmolLM3-3B"),  # one of the four is without rope
    "Qwen2, Qwen2.5": ("Qwen2", dict(tie_word_embeddings=True), "Qwen2.5-Math-1.5B"),
    "Qwen3": ("Qwen3", HEAD | dict(tie_word_embeddings=True), "Qwen3-1.7B-Base"),
    "Gemma": ("Gemma", HEAD | dict(tie_word_embeddings=True), "gemma-2b"),
    "Gemma 3": ("Gemma3Text", HEAD | WINDOW | dict(num_hidden_layers=6), "gemma-3-1b-it"),
    "Mistral": ("Mistral", WINDOW, "Mistral-7B-v0.1"),
    OWN_LAYOUT: ("Mistral", {}, "Mistral-7B-Instruct-v0.3"),
    "Phi-3": ("Phi3", {}, "Phi-3-mini-4k-instruct"),
    "GLM-4": ("Glm4", HEAD, "GLM-4-9B-0414"),
    "OLMo 2": ("Olmo2", {}, "OLMo-2-0425-1B"),
    "Granite": ("Granite", {}, "with logits_scaling 1"),
    "StarCoder 2": ("Starcoder2", WINDOW, "starcoder2-3b"),
    "Pythia": ("GPTNeoX", dict(num_key_value_heads=4), "pythia-1.4b"),
    "GPT-2": ("GPT2", dict(n_positions=256), "gpt2-xl"),
    "OPT": ("OPT", dict(ffn_dim=256, word_embed_proj_dim=128), "opt-1.3b"),
    "Gemma 2": ("Gemma2", HEAD | WINDOW, "gemma-2-2b"),
    "Cohere": ("Cohere", {}, "aya-23-8B"),
    "Granite 3": ("Granite", dict(logits_scaling=8.0), "granite-3.3-2b-base"),
    "StableLM": ("StableLm", {}, "stablelm-2-1_6b"),
    "Mixtral": ("Mixtral", EXPERTS | dict(num_local_experts=4), "Mixtral-8x7B-v0.1"),
    "Qwen3-MoE": (
        "Qwen3Moe",
        EXPERTS | HEAD | dict(num_experts=4, moe_intermediate_size=64),
        "Qwen3-30B-A3B",
    ),
    "Mamba 2": ("Mamba2", dict(num_heads=8, head_dim=32, n_groups=1), "mamba2-1.3b"),
    "LFM2": (
        "Lfm2",
        dict(layer_types=["conv", "full_attention"], block_auto_adjust_ff_dim=False),
        "LFM2-1.2B",
    ),
}
SIZES = "--iterations 2 --prompts_per_iteration 4 --K 2 --minibatch 4 --max_tokens 32 --max_sequence 96"
REST = "--dataset arithmetic --eval_every 0 --save_every 0 --store_every 0 --learning_rate 1e-3"
SETTINGS = f"{SIZES} {REST}".split()


def write_model(name, folder):
    """A tiny random model of a family, with the arithmetic task's tokenizer."""
    kind, options, _ = FAMILIES[name]
    tiny_model(folder, seed=0)
    config = getattr(transformers, f"{kind}Config")(**SMALL | options)
    model = AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:  # spread out, so that a wrong window or place shows
                parameter.normal_(0, 0.08)
    model.save_pretrained(folder)
    if name == OWN_LAYOUT:
        import mistral_common  # comes with vLLM

        source = Path(mistral_common.__file__).parent / "data" / "mistral_instruct_tokenizer_240323.model.v3"
        shutil.copy(source, Path(folder, "tokenizer.model.v3"))
        shutil.copy(Path(folder, "model.safetensors"), Path(folder, "consolidated.safetensors"))
        sizes = dict(dim=128, n_layers=2, head_dim=32, hidden_dim=256, n_heads=4, n_kv_heads=2)
        Path(folder, "params.json").write_text(json.dumps(sizes | dict(norm_eps=1e-6, vocab_size=32)))


def trial(name):
    """The gap as text, or the line by which train.py refuses the family."""
    with tempfile.TemporaryDirectory() as scratch:
        model, run = Path(scratch, "model"), Path(scratch, "run")
        write_model(name, model)
        command = [sys.executable, "train.py", "--model", model, "--run_dir", run, *SETTINGS]
        done = subprocess.run(list(map(str, command)), cwd=common.ROOT, capture_output=True, text=True)
        if done.returncode == 0:
            last = (run / "metrics.jsonl").read_text().splitlines()[-1]
            return f"{json.loads(last)['logprob_gap']:.1e}"
        lines = (done.stdout + done.stderr).strip().splitlines()
        said = next((line for line in reversed(lines) if line.startswith(("train.py:", "ENGINE"))), lines[-1])
        said = said.removeprefix("train.py: ").split(". Likely")[0]
        return re.sub(rf"--model {model}:? (\(\w+\) )?", "", said)


def main():
    parser = common.parser(__doc__)
    parser.add_argument("names", nargs="*", metavar="NAME", help="families; default: all of them")
    names = parser.parse_args().names or list(FAMILIES)
    if unknown := [name for name in names if name not in FAMILIES]:
        sys.exit(f"families.py: {unknown[0]} is no family: choose from {', '.join(FAMILIES)}")
    print(*common.table(["family", "for instance", "gap, or why it is refused"], []), sep="\n")
    for name in names:
        print(f"| {name} | {FAMILIES[name][2]} | {trial(name)} |", flush=True)


if __name__ == "__main__":
    main()
