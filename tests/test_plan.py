"""The plan against what FSDP2 does with the paper's two models on eight ranks; all on the meta device."""

import sys

import pytest
from conftest import python
from transformers import LlamaConfig

import plan
import train

SIZES = dict(  # as published
    rho=dict(
        vocab_size=32000, hidden_size=2048, intermediate_size=5632, num_hidden_layers=22, num_attention_heads=32, num_key_value_heads=4,
        max_position_embeddings=2048, dtype="bfloat16",
    ),
    deepseekmath=dict(
        vocab_size=102400, hidden_size=4096, intermediate_size=11008, num_hidden_layers=30, num_attention_heads=32, num_key_value_heads=32,
        max_position_embeddings=4096, dtype="bfloat16",
    ),
)  # fmt: skip
PARAMETERS = dict(rho=1.10e9, deepseekmath=6.91e9)


@pytest.mark.parametrize("name", SIZES)
def test_a_rank_holds_what_the_plan_says(name):
    done = python(__file__, name)
    assert done.returncode == 0, done.stderr
    held, all_of_them = map(int, done.stdout.split())
    s = train.parse_settings(["--dataset", "math"])
    parts = plan.memory(LlamaConfig(**SIZES[name]), s, 8, 80e9)["training"]
    assert all_of_them == pytest.approx(PARAMETERS[name], rel=0.01)
    assert parts["weights, fp32"] == parts["gradients, fp32"] == parts["AdamW, fp32"] / 2 == 4 * held


@pytest.mark.parametrize("name, ranks, fits", [("rho", 8, True), ("rho", 1, True), ("deepseekmath", 8, True), ("deepseekmath", 1, False)])
def test_the_papers_models_fit_eight_gpus_and_the_program_says_so(name, ranks, fits, tmp_path, tokenizer):
    LlamaConfig(**SIZES[name]).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    done = python("train.py", "--dataset", "math", "--model", tmp_path, "--plan", ranks)
    assert done.returncode == (not fits) and ("does not fit" not in done.stdout) == fits, done.stdout + done.stderr
    assert f"on {ranks} GPUs of 80 GB" in done.stdout


def test_a_value_network_and_a_larger_budget_cost_memory():
    config, settings = LlamaConfig(**SIZES["rho"]), ["--dataset", "math"]
    total = lambda *more: sum(plan.memory(config, train.parse_settings([*settings, *more]), 8, 80e9)["training"].values())
    assert total("--algorithm", "ppo") - total() == pytest.approx(12 * PARAMETERS["rho"] / 8, rel=0.01)
    assert total("--micro_batch_tokens", "16384") > total() > total("--micro_batch_tokens", "2048")


if __name__ == "__main__":  # one of eight ranks, without the others
    import torch
    import torch.distributed as dist
    from torch.distributed.fsdp import fully_shard
    from torch.testing._internal.distributed.fake_pg import FakeStore
    from transformers import AutoModelForCausalLM

    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=8)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(LlamaConfig(**SIZES[sys.argv[1]]))
    for module in (*model.model.layers, model):
        fully_shard(module, mesh=dist.device_mesh.init_device_mesh("cpu", (8,)))
    print(sum(p.to_local().numel() for p in model.parameters()), sum(p.numel() for p in model.parameters()))
