"""The plan against what FSDP2 does with the two models of the paper on eight ranks."""

import re
import sys

import pytest
from conftest import ROOT, python
from transformers import GPT2Config, LlamaConfig, OPTConfig

import train
from tools import plan

SIZES = dict(  # as published
    rho=dict(
        vocab_size=32000, hidden_size=2048, intermediate_size=5632, num_hidden_layers=22,
        num_attention_heads=32, num_key_value_heads=4, max_position_embeddings=2048, dtype="bfloat16",
    ),
    deepseekmath=dict(
        vocab_size=102400, hidden_size=4096, intermediate_size=11008, num_hidden_layers=30,
        num_attention_heads=32, num_key_value_heads=32, max_position_embeddings=4096, dtype="bfloat16",
    ),
)  # fmt: skip
PARAMETERS = dict(rho=1.10e9, deepseekmath=6.91e9)


def config_of(name):
    return LlamaConfig(**SIZES[name]) if name in SIZES else plan.SIZES[name]


def training(name, *options):
    """What a rank of eight needs while it trains."""
    s = train.parse_settings(["--dataset", "math", *options])
    return plan.memory(config_of(name), s, 8, 80e9)["training"]


@pytest.mark.parametrize("name", SIZES)
def test_a_rank_holds_what_the_plan_says(name):
    done = python(__file__, name)
    assert done.returncode == 0, done.stderr
    held, all_of_them = map(int, done.stdout.split())
    parts = training(name)
    assert all_of_them == pytest.approx(PARAMETERS[name], rel=0.01)
    assert parts["weights, fp32"] == parts["gradients, fp32"] == parts["AdamW, fp32"] / 2 == 4 * held


@pytest.mark.parametrize(
    "name, gpus, fits",
    [("rho", 8, True), ("rho", 1, True), ("deepseekmath", 8, True), ("deepseekmath", 1, False)],
)
def test_the_papers_models_fit_eight_gpus_and_the_program_says_so(name, gpus, fits, tmp_path, main_of):
    LlamaConfig(**SIZES[name]).save_pretrained(tmp_path)
    code, output, _ = main_of(plan, "--dataset", "math", "--model", tmp_path, "--gpus", gpus)
    assert code == (not fits), output
    assert ("does not fit" not in output) == fits
    assert f"on {gpus} GPUs of 80 GB" in output


@pytest.mark.parametrize(
    "options, message",
    [
        ([], "--gpus is missing: it must be a number of GPUs, at least 1"),
        (["--gpus", "none"], "--gpus none must be a number of GPUs, at least 1"),
        (["--gpus", "0"], "--gpus 0 must be a number of GPUs, at least 1"),
        (["--gpus", "3"], "--prompts_per_iteration 64 does not divide over 3 ranks: take a multiple of 3"),
        (["--gpus", "8", "--K", "0"], "--K 0 must be at least 1"),
        (["--gpus", "8", "--model", "no/such/model/here"], "--model no/such/model/here cannot be loaded"),
    ],
)
def test_bad_input_gets_one_line(options, message, main_of):
    code, _, line = main_of(plan, "--dataset", "math", *options)
    assert code == 1 and line.startswith(f"plan.py: {message}") and "\n" not in line


HEAD = r"^### [^\n]*: (\d+) GPUs? of (\d+) GB\n\n(?:[^\n ].*\n\n)?"
RECIPE = re.compile(HEAD + r"((?:    .*\n)+)\n([\d.]+) GB while training, ([\d.]+) GB while", re.M)
RECIPES = RECIPE.findall((ROOT / "docs" / "running.md").read_text())
SHAPES = {  # of the models in the recipes
    "realtreetune/rho-1b-sft-MATH": LlamaConfig(**SIZES["rho"]),
    "realtreetune/deepseekmath-7b-sft-MATH-v2": LlamaConfig(**SIZES["deepseekmath"]),
    "Qwen/Qwen2.5-0.5B-Instruct": plan.SIZES["0.5B"],
    "Qwen/Qwen2.5-1.5B-Instruct": plan.SIZES["1.5B"],
}


@pytest.mark.parametrize("gpus, gigabytes, command, training, sampling", RECIPES)
def test_a_recipe_is_accepted_and_fits_as_it_says(gpus, gigabytes, command, training, sampling):
    words = command.replace("\\\n", " ").split()
    s = train.parse_settings(words[words.index("train.py") + 1 :])
    gpus, gpu_bytes = int(gpus), float(gigabytes) * 1e9
    train.check(s, gpus)
    machine = int(next((w.split("=")[1] for w in words if w.startswith("--nproc_per_node=")), 1))
    assert gpus == machine * (2 if "--nnodes" in words else 1)
    config = SHAPES[s.model]
    needs = plan.memory(config, s, machine, gpu_bytes)
    assert plan.fits(needs, plan.kv_tokens(config, s, gpu_bytes), s, gpu_bytes)
    found = [sum(needs[phase].values()) / 1e9 for phase in ("training", "sampling")]
    assert found == [pytest.approx(float(told), abs=0.06) for told in (training, sampling)]


def test_there_are_six_recipes():
    assert len(RECIPES) == 6


@pytest.mark.parametrize("config", [GPT2Config(), OPTConfig(ffn_dim=2048)])
def test_configurations_with_names_of_their_own(config, tmp_path, main_of):
    config.save_pretrained(tmp_path)
    code, output, _ = main_of(plan, "--gpus", 1, "--model", tmp_path)
    assert code == 0 and output.endswith("fits\n")
    assert plan.inner_size(config) == dict(gpt2=3072, opt=2048)[config.model_type]


def test_a_value_network_and_a_larger_budget_cost_memory():
    total, with_critic = (sum(training("rho", *o).values()) for o in ([], ["--algorithm", "ppo"]))
    assert with_critic - total == pytest.approx(12 * PARAMETERS["rho"] / 8, rel=0.01)
    larger, smaller = (
        sum(training("rho", "--micro_batch_tokens", tokens).values()) for tokens in ("16384", "2048")
    )
    assert larger > total > smaller


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
