"""The fine-tuning step against plain torch on the responses alone, and the little model it starts
from.
"""

import json
import shutil

import torch
from conftest import EXACT, python
from transformers import AutoModelForCausalLM

import data
import sft
from model import full_tensors, load_sharded


def test_a_step_is_plain_torch_on_the_response_tokens_whatever_the_micro_batch(tiny_model, tokenizer, device):
    episodes, skipped = sft.sequences(data.load("arithmetic")[0][:8], tokenizer, 256, chat=False)
    assert skipped == 0
    for e in episodes:
        assert e.response_ids[-1] == tokenizer.eos_token_id and e.prompt_ids[-1] == tokenizer.encode("\n")[-1]

    plain = AutoModelForCausalLM.from_pretrained(tiny_model)
    start = {name: t.clone() for name, t in plain.state_dict().items()}
    optimizer = torch.optim.AdamW(plain.parameters(), lr=1e-2, weight_decay=0.0)
    total, count = 0.0, 0
    for e in episodes:
        ids = torch.tensor(e.prompt_ids + e.response_ids)
        logits = plain(ids[None]).logits[0, :-1]
        nll = -logits.log_softmax(-1).gather(-1, ids[1:, None])[len(e.prompt_ids) - 1 :]
        total, count = total + nll.sum(), count + len(nll)
    (total / count).backward()
    torch.nn.utils.clip_grad_norm_(plain.parameters(), 1.0)
    optimizer.step()

    for micro_batch in (3, 8):
        policy = load_sharded(tiny_model, device, **EXACT)
        s = sft.Settings(epochs=1, batch=8, learning_rate=1e-2, micro_batch=micro_batch)
        learner = sft.finetune(policy, episodes, device, s)
        assert learner.step == 1 and abs(learner.means()["loss"] - (total / count).item()) < 1e-5
        for name, tensor in full_tensors(policy):
            expected = plain.state_dict()[name]
            assert (tensor.cpu() - expected).norm() < 1e-3 * (expected - start[name]).norm(), name


def test_a_tokenizer_without_eos_is_refused(tiny_model, tmp_path):
    folder = tmp_path / "model"
    shutil.copytree(tiny_model, folder)
    content = json.loads((folder / "tokenizer_config.json").read_text())
    (folder / "tokenizer_config.json").write_text(json.dumps(content | {"eos_token": None}))
    done = python("sft.py", "--dataset", "arithmetic", "--model", folder, "--out", tmp_path / "out")
    assert done.returncode == 1 and not (tmp_path / "out").exists()
    last = done.stderr.strip().splitlines()[-1]
    assert last == f"sft.py: the tokenizer of --model {folder} has no EOS token to end responses with"


def test_the_tiny_model_spells_by_characters(tiny_model, tokenizer):
    assert 350_000 < AutoModelForCausalLM.from_pretrained(tiny_model).num_parameters() < 500_000
    text = "8*9+6-7?\n8*9=72\n#### 71"
    ids = tokenizer(text)["input_ids"]
    assert (
        len(ids) == len(text) + 1 and ids[0] == tokenizer.bos_token_id and tokenizer.decode(ids[1:]) == text
    )
