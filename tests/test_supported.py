"""Folders that users pass as --model: each that could not be trained right gets one line before anything is loaded."""

import json
import shutil
import threading
import time
from datetime import date
from types import SimpleNamespace

import pytest
import torch
import transformers
from conftest import python
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer, GPT2Config, LlamaConfig
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding
from vllm.config import VllmConfig, set_current_vllm_config
from vllm.model_executor.layers.rotary_embedding import get_rope

import data
import sft
import train
from baselines import dpo, restem
from experiments import values
from rollout import stops
from support import encoder, model_files, pretrained, ranks, run_folder
from support.pretrained import end_of_turn, load_tokenizer, positions
from support.supported import check_supported
from tools import plan

SIZES = dict(vocab_size=24, hidden_size=16, intermediate_size=16, num_hidden_layers=2, num_attention_heads=2)
GPT2 = dict(vocab_size=24, n_embd=16, n_layer=2, n_head=2, n_positions=256)
CHATML = (
    "{% for m in messages %}<|im_start|>{{m['role']}}\n{{m['content']}}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HOME", str(tmp_path / "cache"))
    for cached in model_files.local_folder, pretrained.tokenizer_folder:
        cached.cache_clear()
    return tmp_path / "cache" / "vineppo"


@pytest.fixture
def make(tiny_model, tmp_path):
    """Writes a tiny model of a configuration to a folder, with the arithmetic task's tokenizer."""

    def write(config=None, **options):
        folder = tmp_path / "model"
        shutil.copytree(tiny_model, folder, ignore=shutil.ignore_patterns("*.safetensors", "config.json"))
        config = config or LlamaConfig(
            **SIZES, num_key_value_heads=1, max_position_embeddings=256, tie_word_embeddings=False
        )
        AutoModelForCausalLM.from_config(config).save_pretrained(folder, **options)
        return folder

    return write


def settings(folder, **more):
    given = dict(model=str(folder), dataset="mine", max_sequence=100, chat=False, stop=None)
    return SimpleNamespace(**given | more)


def check(folder, **more):
    load_tokenizer(settings(folder, **more))
    check_supported(str(folder), [[1]])


def change(file, **changes):
    """Set keys of a JSON file; those set to None go."""
    content = json.loads(file.read_text()) | changes
    file.write_text(json.dumps({name: value for name, value in content.items() if value is not None}))


def tensors(f):
    """A change of the stored tensors: f gets them, and changes them or returns others."""

    def changed(folder):
        file = folder / "model.safetensors"
        stored = load_file(file)
        save_file(f(stored) or stored, file, {"format": "pt"})

    return changed


def lacking(name):
    return tensors(lambda t: {other: x for other, x in t.items() if other != name})


def config(**changes):
    return lambda folder: change(folder / "config.json", **changes)


def file(name, content):
    return lambda folder: (folder / name).write_bytes(content)


def instead(name, content=b"x" * 40):
    """Weights in another kind of file."""

    def changed(folder):
        (folder / "model.safetensors").unlink()
        (folder / name).write_bytes(content)

    return changed


def cut(name, size):
    return lambda folder: (folder / name).write_bytes((folder / name).read_bytes()[:size])


def without(*names):
    return lambda folder: [(folder / name).unlink() for name in names]


def lora(folder):
    without("model.safetensors")(folder)
    save_file(
        {"base_model.model.lm_head.lora_A.weight": torch.zeros(2, 2)}, folder / "adapter_model.safetensors"
    )
    (folder / "adapter_config.json").write_text('{"peft_type": "LORA"}')


def only_adapter(folder):
    lora(folder)
    without("config.json")(folder)


def inside(folder):
    files = list(folder.iterdir())
    (folder / "checkpoint-40").mkdir()
    for one in files:
        one.rename(folder / "checkpoint-40" / one.name)


def dangling(folder):
    without("model.safetensors")(folder)
    (folder / "model.safetensors").symlink_to("/nowhere/model.safetensors")


def pickled(*parts, index=True):
    """The weights in pickles, one for each of the functions from all the tensors to its own."""

    def changed(folder):
        stored, places = load_file(folder / "model.safetensors"), {}
        without("model.safetensors")(folder)
        for i, part in enumerate(parts):
            name = "pytorch_model.bin" if len(parts) == 1 else f"pytorch_model-{i}.bin"
            torch.save(part(stored), folder / name)
            places |= dict.fromkeys(part(stored), name)
        if len(parts) > 1:
            (folder / "pytorch_model.bin.index.json").write_text(json.dumps(dict(weight_map=places)))

    return changed


def of_kind(name):
    def changed(folder):
        kind = getattr(transformers, f"{name}Config")()
        named = dict(Bert="BertForMaskedLM", CLIP="CLIPModel")
        kind.architectures = [named.get(name, f"{name}ForConditionalGeneration")]
        kind.save_pretrained(folder)

    return changed


NORM, DOWN = "model.norm.weight", "model.layers.1.mlp.down_proj.weight"
LFS = b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 988097824\n"
QUANTIZED = "name the model that it was made from, whose weights have 16 or 32 bits"
BROKEN = {
    # tensors
    "one missing": (lacking(DOWN), f"files lack {DOWN}, of the 21 tensors of LlamaFor"),
    "a norm missing": (lacking(NORM), f"files lack {NORM}, of"),
    "no embedding": (lacking("model.embed_tokens.weight"), "lack model.embed_tokens.weight"),
    "no head": (lacking("lm_head.weight"), "lm_head.weight, .* or set tie_word_embeddings"),
    "two layers missing": (config(num_hidden_layers=4), "model.layers.2.mlp.gate_proj.weight and 15 others, of the 39"),
    "of a wrapper": (
        tensors(lambda t: {f"base_model.model.{name}": x for name, x in t.items()}),
        "lack lm_head.weight, .*; instead they hold base_model.model.lm_head.weight, .* and 18 others: copy or save",
    ),
    "of a bare model": (
        tensors(lambda t: {name.removeprefix("model."): x for name, x in t.items()}),
        'hold embed_tokens.weight, .* without "model." before the names, .*: load it with AutoModelForCausalLM, save',
    ),
    "another vocabulary": (config(vocab_size=32), r"lm_head.weight as \[24, 16\], its config.json makes it \[32, 1"),
    "fewer layers": (config(num_hidden_layers=1), "hold model.layers.1.*, for which LlamaForCausalLM has no place"),
    "biases": (
        tensors(lambda t: t.update({"model.layers.0.self_attn.q_proj.bias": torch.ones(16)})),
        "hold model.layers.0.self_attn.q_proj.bias, for which LlamaForCausalLM has no place: remove them, or correct",
    ),
    "a value head": (tensors(lambda t: t.update({"v_head.weight": torch.ones(1, 16)})), "files hold v_head.weight"),
    "tied by mistake": (config(tie_word_embeddings=True), "one tensor, its files hold different ones: correct tie_"),
    # files of the weights
    "cut short": (cut("model.safetensors", -1), "model.safetensors is cut short or damaged: copy or download it again"),
    "cut in the header": (cut("model.safetensors", 50), "model.safetensors is cut short or damaged"),
    "zero bytes": (file("model.safetensors", b""), "model.safetensors is cut short or damaged"),
    "a page": (file("model.safetensors", b"<!DOCTYPE html>" * 9), "model.safetensors is cut short or damaged"),
    "LFS weights": (file("model.safetensors", LFS), "model.safetensors is a Git LFS pointer, .* run `git lfs pull`"),
    "LFS pickle": (instead("pytorch_model.bin", LFS), "pytorch_model.bin is a Git LFS pointer"),
    "a dangling link": (dangling, "model.safetensors is not a file, or a link to one that is gone"),
    "two sets": (
        file("model.safetensors.index.json", b'{"weight_map": {"a": "config.json"}}'),
        "two sets of weights, model.safetensors and the 1 files that model.safetensors.index.json names: remove the",
    ),
    "pickled, one missing": (pickled(lambda t: {DOWN: t[DOWN]}), "files lack lm_head.weight, .* and 17 others"),
    "pickled, a part missing": (
        lambda folder: [pickled(dict, dict)(folder), without("pytorch_model-1.bin")(folder)],
        "lacks 1 of the 1 files that pytorch_model.bin.index.json names, pytorch_model-1.bin first",
    ),
    "pickled, nested": (pickled(lambda t: {"state_dict": t}), "pytorch_model.bin is refused: it is not a file of"),
    "pickled, nothing": (instead("pytorch_model.bin", b""), "pytorch_model.bin is refused: it is not a file of"),
    # other kinds of weights
    "adapter": (lora, r"holds an adapter \(adapter_config.json\): merge it into its base model"),
    "adapter alone": (only_adapter, r"holds an adapter \(adapter_config.json\): merge it into its base model"),
    "GGUF": (instead("m-Q4_K_M.gguf"), "GGUF files are for llama.cpp: name the Hugging Face model that they were made"),
    "GGUF alone": (lambda folder: [one.rename(folder / "m.gguf") for one in folder.iterdir()], "GGUF files are for"),
    "consolidated": (instead("consolidated.safetensors"), "has no weights: .* it holds consolidated.safetensors: name"),
    "TensorFlow": (instead("tf_model.h5"), "has no weights: neither model.safetensors, .* it holds tf_model.h5: name"),
    "a variant": (instead("model.fp16.safetensors"), "has no weights: .*; it holds model.fp16.safetensors"),
    "parts": (instead("model-00001-of-00002.safetensors"), "has parts of the weights, but not their index"),
    "GPTQ": (config(quantization_config=dict(quant_method="gptq", bits=4)), rf"quantized \(gptq, .*\): {QUANTIZED}"),
    "AWQ": (config(quantization_config=dict(quant_method="awq")), "is quantized .awq, says its config.json"),
    "bitsandbytes": (config(quantization_config=dict(quant_method="bitsandbytes")), "is quantized .bitsandbytes"),
    "8 bits": (tensors(lambda t: t.update({DOWN: t[DOWN].char()})), f"quantized, {DOWN} is stored as I8: {QUANTIZED}"),
    "FP8": (tensors(lambda t: t.update({DOWN: t[DOWN].to(torch.float8_e4m3fn)})), "is stored as F8_E4M3"),
    "packed": (tensors(lambda t: t.update({"x.qweight": torch.ones(2, 2).int()})), "quantized, x.qweight is stored as"),
    # the configuration
    "no config": (without("config.json"), "has no config.json; it holds model.safetensors: name the model in Hugging"),
    "nothing": (lambda folder: [one.unlink() for one in folder.iterdir()], "has no config.json; it holds nothing"),
    "inside": (inside, "has no config.json; name a folder inside of it, such as .*model/checkpoint-40"),
    "config of zero bytes": (file("config.json", b""), "config.json is not a JSON object: copy or download it again"),
    "config is a list": (file("config.json", b"[]"), "config.json is not a JSON object"),
    "config of no type": (file("config.json", b"{}"), r"cannot be loaded: .* \(Unrecognized model in"),
    "config of an unknown type": (config(model_type="none"), "cannot be loaded: .* has model type `none`"),
    "config with a text": (config(hidden_size="big"), "cannot be loaded: .*'hidden_size': TypeError"),
    "config of no model": (config(hidden_act="none"), r"its config.json makes no model \(KeyError: 'none'\)"),
    "no architectures": (config(architectures=None), 'lacks a line "architectures": \\["LlamaForCausalLM"\\]'),
    "reward model": (
        config(architectures=["LlamaForSequenceClassification"]),
        r"is a LlamaForSequenceClassification of type llama \(its config.json\), not a causal language model of text",
    ),
    "embedding model": (config(architectures=["LlamaModel"]), "is a LlamaModel of type llama"),
    "of another type": (config(architectures=["Qwen2ForCausalLM"]), "is a Qwen2ForCausalLM of type llama"),
    "generation config": (file("generation_config.json", b"[1]"), "generation_config.json is not a JSON object"),
    "yarn without a factor": (config(rope_parameters=dict(rope_type="yarn")), "cannot be loaded: .*'factor'"),
    "yarn with null": (config(rope_parameters=dict(rope_type="yarn", factor=None)), "rope parameters of .* lack a"),
    "two ropes": (
        config(rope_scaling=dict(rope_type="linear", factor=2.0)),
        "has rope_scaling beside rope_parameters, of which transformers then forgets rope_theta: write it all into one",
    ),
    # the tokenizer
    "no tokenizer": (
        without("tokenizer.json", "tokenizer_config.json"),
        r"has no tokenizer \(tokenizer.json, tokenizer.model or vocab.json\): copy it there",
    ),
    "tokenizer of zero bytes": (file("tokenizer.json", b""), "cannot be read; is its tokenizer.json whole. .Expecting"),
    "pickled tokenizer": (file("tokenizer.json", b"\x80\x04\x95"), "cannot be read; is its .* codec can't decode"),
    "LFS tokenizer": (file("tokenizer.json", LFS), "tokenizer.json is a Git LFS pointer"),
    "tokenizer of another version": (
        lambda folder: change(folder / "tokenizer.json", model=dict(type="BPE2", vocab={}, merges=5)),
        "the tokenizer in .* cannot be read; is its tokenizer.json whole. .Exception: data did not match",
    ),
    "tokenizer that reads nothing": (
        lambda folder: [
            without("tokenizer.json", "tokenizer_config.json")(folder),
            file("vocab.txt", b"")(folder),
            config(model_type="qwen2", architectures=["Qwen2ForCausalLM"])(folder),
        ],
        r"the tokenizer in .* cannot be read from vocab.txt: .*and reads no text\)",
    ),
    "its code": (
        file("tokenizer_config.json", b'{"tokenizer_class": "Own", "auto_map": {"AutoTokenizer": ["own.Own", null]}}'),
        "the tokenizer in .* cannot be read .*add --trust_remote_code if you trust it",
    ),
} | {
    f"kind {name}": (of_kind(name), "not a causal language model of text alone")
    for name in ("Bert", "T5", "CLIP", "Whisper", "Gemma3", "Qwen2_5_VL", "Qwen2Audio")
}  # fmt: skip


@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_folder_gets_one_line(name, make, capfd):
    change_it, message = BROKEN[name]
    folder = make()
    check(folder)
    change_it(folder)
    model_files.local_folder.cache_clear()
    pretrained.tokenizer_folder.cache_clear()
    with pytest.raises(ValueError, match=message) as error:
        check(folder)
    assert "\n" not in str(error.value) and len(str(error.value)) < 600 and str(folder) in str(error.value)
    assert "[transformers]" not in capfd.readouterr().err


@pytest.mark.parametrize("name", ["/nowhere/model", "./nowhere", "../nowhere", "runs/none", "~/none"])
def test_a_path_is_not_looked_for_on_the_hub(name, capsys):
    with pytest.raises(
        ValueError, match=r"cannot be loaded: name a Hugging Face folder .* \(there is no such folder\)$"
    ):
        load_tokenizer(settings(name))
    assert not capsys.readouterr().out


def tied(t):
    t["lm_head.weight"] = t["model.embed_tokens.weight"].clone()


def old_buffers(t):
    for i in (0, 1):
        t[f"model.layers.{i}.self_attn.rotary_emb.inv_freq"] = torch.ones(4)


def old_masks(t):
    t["transformer.h.0.attn.bias"] = torch.ones(1, 1, 256, 256, dtype=torch.uint8)
    t["transformer.h.0.attn.masked_bias"] = torch.tensor(-1e4)


LLAMA = dict(num_key_value_heads=1, max_position_embeddings=256)
TIED = LlamaConfig(**SIZES, **LLAMA, tie_word_embeddings=True)
WHOLE = {
    "tied": (TIED, lambda folder: None),
    "tied, both stored": (TIED, tensors(tied)),
    "16 bits": (None, tensors(lambda t: {name: x.bfloat16() for name, x in t.items()})),
    "old buffers": (None, tensors(old_buffers)),
    "old masks": (GPT2Config(**GPT2), tensors(old_masks)),
    "old names": (
        GPT2Config(**GPT2),
        tensors(lambda t: {name.removeprefix("transformer."): x for name, x in t.items()}),
    ),
    "an index of one file": (
        None,
        file("model.safetensors.index.json", b'{"weight_map": {"lm_head.weight": "model.safetensors"}}'),
    ),
    "pickled": (None, pickled(dict)),
    "pickled in parts": (
        None,
        pickled(lambda t: dict(list(t.items())[::2]), lambda t: dict(list(t.items())[1::2])),
    ),
    "quantization null": (None, config(quantization_config={})),
}


@pytest.mark.parametrize("name", WHOLE)
def test_what_is_whole_passes(name, make):
    kind, change_it = WHOLE[name]
    folder = make(kind)
    change_it(folder)
    check(folder)


def test_shards_pass_until_one_is_damaged_or_gone(make):
    folder = make(max_shard_size="3KB")
    check(folder)
    first, *_, last = sorted(folder.glob("model-*.safetensors"))
    (folder / "model-00001-of-00002.safetensors").write_bytes(
        b"of an earlier export"
    )  # the index does not name it
    check(folder)
    content = last.read_bytes()
    last.write_bytes(content[:-1])
    with pytest.raises(ValueError, match=f"{last.name} is cut short or damaged"):
        check(folder)
    last.write_bytes(content)
    first.unlink()
    model_files.local_folder.cache_clear()
    with pytest.raises(
        ValueError, match=f"lacks 1 of the .* files that .* names, {first.name} first: copy or downl"
    ):
        check(folder)


def test_a_file_that_is_another_users_is_named(make, few, main_of, monkeypatch, tmp_path):
    """The superuser, who may run the tests, reads everything: so the refusal is made."""
    folder, opened = make(), open

    def refusing(path, *arguments, **options):
        if str(path).endswith("model.safetensors"):
            raise PermissionError(13, "Permission denied", str(path))
        return opened(path, *arguments, **options)

    monkeypatch.setattr(model_files, "open", refusing, raising=False)
    _, _, said = main_of(train, *few, *SHORT, "--model", folder, "--run_dir", tmp_path / "run")
    assert said == f"train.py: [Errno 13] Permission denied: '{folder}/model.safetensors'"


@pytest.mark.parametrize("stray", ["consolidated.safetensors", "model.fp16.safetensors"])
def test_engine_and_trainer_read_the_same_files(stray, make, cache):
    """Without an index vLLM reads every *.safetensors of a folder, transformers one."""
    folder = make()
    save_file({"lm_head.weight": torch.zeros(24, 16)}, folder / stray)
    read = model_files.local_folder(folder)
    assert [path.name for path in model_files.Path(read).glob("*.safetensors")] == ["model.safetensors"]
    check(folder)


@pytest.fixture
def few(tmp_path):
    """Settings of a data set of 20 problems, which the arithmetic task's tokenizer reads."""
    rows = [dict(problem=f"{i}+1?", answer=str(i + 1), solution=f"#### {i + 1}") for i in range(20)]
    (tmp_path / "few.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return ["--dataset", tmp_path / "few.jsonl", "--prompt_template", r"{problem}\n"]


SHORT = ["--max_tokens", 20, "--max_sequence", 100]
PROGRAMS = {
    "train": (train, SHORT),
    "eval_only": (train, [*SHORT, "--eval_only"]),
    "ppo": (train, [*SHORT, "--algorithm", "ppo"]),
    "sft": (sft, ["--batch", 8]),
    "dpo": (dpo, SHORT),
    "restem": (restem, SHORT),
}


@pytest.mark.parametrize("name", PROGRAMS)
def test_every_program_refuses_a_missing_tensor_before_its_ranks_meet(
    name, make, few, main_of, monkeypatch, tmp_path
):
    module, arguments = PROGRAMS[name]
    for where in ("train.init_distributed", "sft.init_distributed", "baselines.rounds.init_distributed"):
        monkeypatch.setattr(where, lambda: pytest.fail("it began"))
    folder, out = make(), "--out" if module is sft else "--run_dir"
    lacking(NORM)(folder)
    main = SimpleNamespace(
        __name__=module.__name__, main=getattr(module, "main", None) or main_of_rounds(module)
    )
    code, _, said = main_of(main, *few, *arguments, "--model", folder, out, tmp_path / "run")
    assert (
        code == 1
        and f"--model {folder}: its files lack {NORM}, of the 21 tensors" in said
        and "\n" not in said
    )
    assert not (tmp_path / "run").exists()


def main_of_rounds(module):
    """Of a baseline, whose program is rounds.main."""
    name = module.__name__.split(".")[-1]
    return lambda: module.rounds.main(name, module.__doc__, module.Settings, module.train_round)


def test_the_base_model_of_restem_and_the_models_of_checkpoints_are_checked_too(
    make, few, tiny_model, main_of, tmp_path
):
    folder = make()
    lacking(NORM)(folder)
    main = SimpleNamespace(__name__="restem", main=main_of_rounds(restem))
    models = ["--model", tiny_model, "--base_model", folder, "--run_dir", tmp_path / "run"]
    assert NORM in main_of(main, *few, *SHORT, *models)[2]
    checkpoint = tmp_path / "r" / "checkpoints" / "3"
    shutil.copytree(folder, checkpoint)
    (tmp_path / "r" / "settings.json").write_text('{"dataset": "arithmetic", "model": "none"}')
    assert NORM in main_of(values, checkpoint)[2]


def test_a_plan_needs_no_weights_and_refuses_what_cannot_be_trained(make):
    folder = make()
    without("model.safetensors")(folder)
    plan.parse(["--gpus", "1", "--dataset", "arithmetic", "--model", str(folder)])
    config(quantization_config=dict(quant_method="gptq"))(folder)
    with pytest.raises(ValueError, match="is quantized"):
        plan.parse(["--gpus", "1", "--dataset", "arithmetic", "--model", str(folder)])


def test_a_critic_that_transformers_does_not_have_is_refused(make):
    folder = make(GPT2Config(**GPT2))
    check_supported(str(folder), critic=True)
    shutil.rmtree(folder)
    kind = transformers.OPTConfig(
        vocab_size=24, hidden_size=16, ffn_dim=16, num_hidden_layers=2, num_attention_heads=2
    )
    folder = make(kind)
    check_supported(str(folder))
    with pytest.raises(ValueError, match="with --algorithm ppo: its critic would be a token classifier"):
        check_supported(str(folder), critic=True)


# --- copies ---


def template_of(folder):
    for cached in model_files.local_folder, pretrained.tokenizer_folder:
        cached.cache_clear()
    return pretrained.read_tokenizer(folder).chat_template


@pytest.mark.parametrize("how", ["pickled", "under a wrong class"])
def test_what_lies_beside_a_copy_is_never_an_older_one(how, make, monkeypatch, cache):
    folder = make()
    if how == "pickled":
        pickled(dict)(folder)
    else:  # as DeepSeekMath's tokenizer, which AutoTokenizer misreads
        alike = iter([False, True] * 9)
        monkeypatch.setattr(pretrained, "reads_alike", lambda *_: next(alike))
    for text, end in (("OLD", [1, 2]), ("NEW", [2])):
        (folder / "chat_template.jinja").write_text(text)
        (folder / "generation_config.json").write_text(json.dumps(dict(eos_token_id=end)))
        change(folder / "tokenizer_config.json", model_max_length=len(text) + end[0])
        assert template_of(folder) == text and pretrained.generation_config(folder).eos_token_id == end
        assert pretrained.read_tokenizer(folder).model_max_length == len(text) + end[0]
    (folder / "chat_template.jinja").unlink()
    assert template_of(folder) is None
    assert [path for path in cache.iterdir() if path.is_dir()]


def test_models_with_one_tokenizer_keep_their_own_templates(make, monkeypatch, tmp_path):
    alike = iter([False, True] * 9)
    monkeypatch.setattr(pretrained, "reads_alike", lambda *_: next(alike))
    one, other = make(), tmp_path / "other"
    shutil.copytree(one, other)
    (one / "chat_template.jinja").write_text("one")
    (other / "chat_template.jinja").write_text("other")
    assert [template_of(folder) for folder in (one, other, one)] == ["one", "other", "one"]


def test_copies_that_are_made_at_once_are_made_once(cache):
    made = []

    def make(draft):
        draft.mkdir()
        made.append(draft)
        time.sleep(0.2)
        (draft / "whole").write_text("")

    def run():
        assert (model_files.Path(model_files.made_once("key", "about", make)) / "whole").exists()

    threads = [threading.Thread(target=run) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(made) == 1 and not list(cache.glob("*.unfinished"))


# --- positions ---

SHORT_LONG = dict(short_factor=[1.0 + i / 9 for i in range(4)], long_factor=[2.0 + i for i in range(4)])
ROPES = {  # parameters, the configuration's positions, those of a sequence
    "none": (None, 256, 256),
    "yarn": (dict(rope_type="yarn", factor=4.0, original_max_position_embeddings=256), 256, 1024),
    "yarn, as older files": (dict(type="yarn", factor=4.0), 256, 1024),
    "yarn, scaled already": (
        dict(rope_type="yarn", factor=4.0, original_max_position_embeddings=256),
        1024,
        1024,
    ),
    "yarn of less": (dict(rope_type="yarn", factor=2.0, original_max_position_embeddings=256), 1024, 512),
    "linear": (dict(rope_type="linear", factor=4.0), 256, 1024),
    "dynamic": (dict(rope_type="dynamic", factor=4.0), 256, 256),
    "llama3": (
        dict(rope_type="llama3", factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0)
        | dict(original_max_position_embeddings=64),
        256,
        256,
    ),
    "longrope": (dict(rope_type="longrope", **SHORT_LONG, original_max_position_embeddings=256), 1024, 256),
}


@pytest.mark.parametrize("how", ["rope_scaling", "rope_parameters"])
@pytest.mark.parametrize("name", ROPES)
def test_a_sequence_may_have_the_positions_that_engine_and_trainer_compute_alike(name, how, make):
    rope, most, expected = ROPES[name]
    folder = make()
    parameters = rope and (rope if how == "rope_scaling" else rope | dict(rope_theta=1e4))
    changes = dict(rope_parameters=None) | {how: parameters}
    change(folder / "config.json", max_position_embeddings=most, **changes)
    read = pretrained.read_config(folder)
    assert positions(read) == expected
    load_tokenizer(settings(folder, max_sequence=expected))
    with pytest.raises(
        ValueError, match=f"--max_sequence {expected + 1} is more than the {expected} positions of"
    ):
        load_tokenizer(settings(folder, max_sequence=expected + 1))
    ours = LlamaRotaryEmbedding(read)(torch.zeros(1, expected, 16), torch.arange(expected)[None])
    engine = VllmConfig()
    engine.model_config = SimpleNamespace(max_model_len=expected)
    with set_current_vllm_config(engine, check_compile=False):
        theirs = get_rope(8, most, True, dict(read.rope_parameters), torch.float32)
    cos_sin = theirs.long_short_cos_sin_cache if name == "longrope" else theirs.cos_sin_cache
    assert len(cos_sin) >= expected
    for computed, known in zip(ours, cos_sin[:expected].chunk(2, 1)):
        assert torch.equal(computed[0, :, :4], known)


# --- chat templates ---

LLAMA2 = (
    "{% for m in messages %}{% if m['role'] == 'user' %}<s>[INST] {{m['content']}} [/INST]"
    "{% else %} {{m['content']}} </s>{% endif %}{% endfor %}"
)
ROLES = (
    "{% for m in messages %}<|{{m['role']}}|>\n{{m['content']}}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
PLAIN = "{% for m in messages %}{{m['role']}}: {{m['content']}}\n\n{% endfor %}"
ONE_TURN = (
    "{% if messages | length > 1 %}{{ raise_exception('one message') }}{% endif %}{{messages[0]['content']}}"
)


@pytest.fixture
def chatty(make):
    """The tokenizer with the tokens of some chat templates."""
    tokenizer = AutoTokenizer.from_pretrained(make())
    tokens = ["<|im_start|>", "<|im_end|>", "<s>", "</s>", "<|user|>", "<|assistant|>", "  "]
    tokenizer.add_special_tokens({"additional_special_tokens": tokens})
    return tokenizer


@pytest.mark.parametrize(
    "template, end",
    [
        (CHATML, "<|im_end|>"),
        (LLAMA2, "</s>"),
        (ROLES, "<|user|>"),
        (PLAIN, None),
        (ONE_TURN, None),
        (None, None),
    ],
)
def test_the_token_that_ends_a_turn_ends_a_response_in_a_chat(template, end, chatty):
    chatty.chat_template = template
    assert end_of_turn(chatty) == end
    ids = [chatty.convert_tokens_to_ids(end)] if end else []
    assert stops(SimpleNamespace(stop="#", chat=True), chatty) == (["#"], ids)
    assert stops(SimpleNamespace(stop="#", chat=False), chatty) == (["#"], [])
    assert stops(SimpleNamespace(stop="<s>", chat=True), chatty)[1] == [
        chatty.convert_tokens_to_ids("<s>"),
        *ids,
    ]


def test_a_chat_says_once_what_ends_a_response(chatty):
    s, said = SimpleNamespace(max_sequence=100, max_tokens=10, chat=True, chat_options=None), []
    splits = [[data.Problem("1+1?", "2", text="1+1?")]] * 2
    for template, eos in ((CHATML, "<eos>"), (CHATML, "<|im_end|>"), (PLAIN, "<eos>")):
        chatty.chat_template, chatty.eos_token = template, eos
        data.encode_splits(splits, chatty, s, said.append)
    ended, none = (line for line in said if line.startswith("--chat"))
    assert (
        ended
        == "--chat: a response ends at <|im_end|>, too, which ends an assistant's turn in the chat template"
    )
    assert none == "--chat: name a --stop: no token ends an assistant's turn in the chat template"


@pytest.mark.parametrize(
    "template, reason",
    [
        (
            "{{ raise_exception('The first message must be a system message') }}",
            "The first message must be a system",
        ),
        ("{{ messages | none_such }}", "No filter named 'none_such'"),
        ("{{ none_such() }}", "'none_such' is undefined"),
        ("{% for m in messages %}", "Unexpected end of template"),
        ("{{ messages[0]['content'] + 1 }}", "can only concatenate str"),
    ],
)
def test_a_template_that_writes_no_prompt_gets_one_line(template, reason, make, few, main_of, tmp_path):
    folder = make()
    (folder / "chat_template.jinja").write_text(template)
    _, _, said = main_of(train, *few, *SHORT, "--chat", "--model", folder, "--run_dir", tmp_path / "run")
    assert said.startswith(f"train.py: --chat: the chat template of {folder} writes no prompt (")
    assert reason in said and "\n" not in said and not (tmp_path / "run").exists()


DATED = (
    "{% if strftime_now is defined %}{{ strftime_now('%d %b %Y') }}{% endif %} {{ messages[0]['content'] }}"
    "{% if add_generation_prompt %}!{% endif %}"
)


def test_a_run_keeps_the_date_of_its_first_start(chatty, tmp_path, monkeypatch):
    """Else the prompts of a template that writes the date would change, and a resume would be refused."""
    chatty.chat_template, problems = DATED, [data.Problem("1+1?", "2", text="1+1?")]

    class Day(date):
        now = date(2026, 7, 1)

        @classmethod
        def today(cls):
            return cls.now

    monkeypatch.setattr(run_folder, "date", Day)
    monkeypatch.setattr(encoder, "date", Day)
    assert run_folder.first_day(tmp_path) == Day.now
    prompts, found = [], []
    for Day.now in (date(2026, 7, 1), date(2026, 7, 2)):
        day = run_folder.first_day(tmp_path)
        (tmp_path / "inputs.json").write_text(json.dumps(dict(day=str(day))))
        encoded, _ = data.encode(problems, chatty, 100, chat=True, day=day)
        found.append(data.fingerprint(encoded))
        prompts.append(data.encode(problems, chatty, 100, chat=True)[0][0].prompt_ids)
    assert found[0] == found[1] and prompts[0] != prompts[1]
    (tmp_path / "inputs.json").write_text("{}")  # of a run that was begun before
    assert run_folder.first_day(tmp_path) == Day.now


# --- the environment ---

ALL = dict(
    RANK="1", LOCAL_RANK="1", WORLD_SIZE="2", LOCAL_WORLD_SIZE="2", MASTER_ADDR="127.0.0.1", MASTER_PORT="1"
)


@pytest.mark.parametrize(
    "given, world",
    [
        ({}, 1),
        (ALL, 2),
        (dict(RANK="0", WORLD_SIZE="1", MASTER_ADDR="127.0.0.1", MASTER_PORT="29777"), 1),
        (dict(WORLD_SIZE="1"), 1),
        (dict(LOCAL_RANK="0"), 1),
        (dict(WORLD_SIZE="8"), "the environment has WORLD_SIZE=8, but no LOCAL_RANK: start with torchrun"),
        (
            dict(RANK="0", WORLD_SIZE="8", LOCAL_RANK="0"),
            "has RANK=0, WORLD_SIZE=8, but no LOCAL_WORLD_SIZE: start",
        ),
        (dict(RANK="3"), "the environment has RANK=3, but no LOCAL_RANK: start with torchrun"),
    ],
)
def test_an_environment_without_torchrun_is_one_rank_or_gets_one_line(given, world, monkeypatch):
    for name in ALL:
        monkeypatch.delenv(name, raising=False)
    for name, value in given.items():
        monkeypatch.setenv(name, value)
    if isinstance(world, int):
        assert ranks.world_size() == world
    else:
        with pytest.raises(ValueError, match=world):
            ranks.world_size()


def test_the_environment_of_a_notebook_forms_a_group_of_one_rank():
    join = "from support.ranks import init_distributed as join, dist; print(join(), dist.get_world_size())"
    given = dict(RANK="0", WORLD_SIZE="1", MASTER_ADDR="127.0.0.1", MASTER_PORT="29777")
    done = python("-c", join, **given)
    assert done.returncode == 0 and done.stdout.split()[-1] == "1", done.stderr


@pytest.mark.parametrize("program", [train.Settings, sft.Settings, restem.Settings])
def test_a_line_end_in_a_text_may_be_written_as_help_shows_it(program):
    names = {field for field in ("stop", "prompt_template") if hasattr(program, field)}
    assert names >= {"prompt_template"}
    arguments = [word for name in names for word in (f"--{name}", r"{problem}\n\nQ:")]
    s, _ = train.parse(program, [*arguments, "--model", r"a\new"], "", {}, {})
    assert all(getattr(s, name) == "{problem}\n\nQ:" for name in names) and s.model == r"a\new"
