"""Models on this machine: pickled weights are converted, and what could run code is refused."""

import json
import os
import shutil
from types import SimpleNamespace

import pytest
import torch
from conftest import GAP, python
from huggingface_hub import constants
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig, PreTrainedTokenizerFast
from vllm.tokenizers import get_tokenizer

from experiments.families import FAMILIES, OWN_LAYOUT, write_model
from model import full_tensors, load_sharded, save_pretrained
from support import model_files, pretrained
from support.supported import check_supported


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setattr(constants, "HF_HOME", str(tmp_path / "cache"))
    for cached in model_files.local_folder, pretrained.tokenizer_folder:
        cached.cache_clear()
    yield tmp_path / "cache" / "vineppo"
    for cached in model_files.local_folder, pretrained.tokenizer_folder:
        cached.cache_clear()


@pytest.fixture
def pickled(tiny_model, tmp_path):
    """(a folder with the tiny model's configuration, its weights, two of them in one memory)"""
    model = AutoModelForCausalLM.from_pretrained(tiny_model)
    folder = tmp_path / "pickled"
    folder.mkdir()
    model.config.save_pretrained(folder)
    state = model.state_dict()
    state["lm_head.weight"] = state["model.embed_tokens.weight"]
    return folder, state


@pytest.mark.parametrize("shards", [1, 2])
def test_pickled_weights_are_converted_once(pickled, cache, device, shards):
    folder, state = pickled
    for i in range(shards):
        name = "pytorch_model.bin" if shards == 1 else f"pytorch_model-0000{i + 1}-of-00002.bin"
        torch.save(dict(list(state.items())[i::shards]), folder / name)
    for name, tensor in full_tensors(load_sharded(folder, device)):
        assert torch.equal(tensor.cpu(), state[name]), name
    (converted,) = (path for path in cache.iterdir() if path.is_dir())
    before = converted.stat().st_mtime_ns
    model_files.local_folder.cache_clear()
    assert model_files.local_folder(folder) == str(converted) and converted.stat().st_mtime_ns == before


@pytest.mark.parametrize("safe", [True, False])
def test_pickles_are_downloaded_only_where_there_is_nothing_else(
    safe, tiny_model, cache, tmp_path, monkeypatch
):
    """From a double of the hub, which gives the files that are asked for."""
    hub, local = tmp_path / "hub", tmp_path / "local"
    shutil.copytree(tiny_model, hub)
    local.mkdir()
    torch.save(AutoModelForCausalLM.from_pretrained(tiny_model).state_dict(), hub / "pytorch_model.bin")
    if not safe:
        (hub / "model.safetensors").unlink()

    def snapshot_download(name, allow_patterns, ignore_patterns):
        assert name == "own/model" and ignore_patterns == ["*/*", "consolidated*"]
        for file in hub.iterdir():
            if any(file.match(pattern) for pattern in allow_patterns):
                shutil.copy(file, local)
        return str(local)

    monkeypatch.setattr(model_files, "snapshot_download", snapshot_download)
    folder = model_files.local_folder("own/model")
    assert (folder == str(local)) == safe != (local / "pytorch_model.bin").exists()
    assert AutoModelForCausalLM.from_pretrained(folder, use_safetensors=True).num_parameters() > 0


class Hostile:
    def __reduce__(self):
        return os.mkdir, (os.environ["VINEPPO_HOSTILE"],)


def test_a_pickle_that_would_run_code_is_refused(pickled, cache, device, tmp_path, monkeypatch):
    folder, state = pickled
    monkeypatch.setenv("VINEPPO_HOSTILE", str(tmp_path / "it_ran"))
    torch.save(state | {"more": Hostile()}, folder / "pytorch_model.bin")
    with pytest.raises(ValueError, match="pytorch_model.bin is refused: it is not a file of tensors alone"):
        load_sharded(folder, device)
    assert not (tmp_path / "it_ran").exists()


@pytest.fixture
def byte_level(tiny_model, tmp_path):
    """A folder with the tiny model, and a byte-level tokenizer with a token for 12."""
    folder = tmp_path / "byte_level"
    shutil.copytree(tiny_model, folder)
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        initial_alphabet=alphabet, special_tokens=["<bos>", "<eos>"], show_progress=False
    )
    tokenizer.train_from_iterator(["Problem:\nFind the 12. Solution: It's 3.\n\n"], trainer)
    special = dict(bos_token="<bos>", eos_token="<eos>")
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special).save_pretrained(folder)
    return folder


def set_in(file, **changes):
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


@pytest.mark.parametrize("label, model_type", [("LlamaTokenizerFast", "llama"), ("LlamaTokenizer", "qwen2")])
def test_a_tokenizer_under_a_wrong_class_reads_text_as_its_file_says(byte_level, cache, label, model_type):
    """DeepSeekMath's is labelled LlamaTokenizerFast; with that class transformers 5 drops spaces and newlines.

    Under a model type with a class of its own, as DeepSeek-R1-Distill-Qwen, other ids come out.
    """
    right = Tokenizer.from_file(str(byte_level / "tokenizer.json")).encode(pretrained.PROBE).ids
    set_in(byte_level / "tokenizer_config.json", tokenizer_class=label, add_bos_token=True)
    architecture = {"llama": "LlamaForCausalLM", "qwen2": "Qwen2ForCausalLM"}[model_type]
    set_in(byte_level / "config.json", model_type=model_type, architectures=[architecture])
    wrong = AutoTokenizer.from_pretrained(byte_level).encode(pretrained.PROBE, add_special_tokens=False)
    assert wrong != right  # else: why all this?
    engines = get_tokenizer(pretrained.tokenizer_folder(byte_level), tokenizer_mode="hf")
    for tokenizer in pretrained.load_tokenizer(settings(byte_level)), engines:
        assert tokenizer.encode(pretrained.PROBE) == [tokenizer.bos_token_id, *right]
        assert tokenizer.decode(right) == pretrained.PROBE


def test_a_tokenizer_whose_class_is_right_is_left_where_it_is(byte_level, tiny_model, cache):
    for folder in byte_level, tiny_model:
        assert pretrained.tokenizer_folder(folder) == str(folder)
    set_in(byte_level / "tokenizer_config.json", auto_map={"AutoTokenizer": ["own.Own", None]})
    pretrained.tokenizer_folder.cache_clear()
    assert pretrained.tokenizer_folder(byte_level) == str(byte_level)
    assert not cache.exists()


def test_a_tokenizer_that_a_copy_does_not_mend_is_left_where_it_is(byte_level, cache, monkeypatch, capsys):
    monkeypatch.setattr(pretrained, "reads_alike", lambda *_: False)
    assert pretrained.tokenizer_folder(byte_level) == str(byte_level)
    assert "is copied without its class TokenizersBackend" in capsys.readouterr().out


def settings(folder):
    return SimpleNamespace(model=str(folder), dataset="mine", max_sequence=100)


def test_a_temperature_without_do_sample_does_not_end_the_run_at_its_first_checkpoint(
    tiny_model, device, tmp_path
):
    """As Llama 2 and Vicuna have it: transformers reads such a generation_config.json and refuses to write it."""
    folder = tmp_path / "model"
    shutil.copytree(tiny_model, folder)
    (folder / "generation_config.json").write_text('{"temperature": 0.9, "top_p": 0.6, "eos_token_id": 2}')
    tokenizer = pretrained.load_tokenizer(settings(folder))
    save_pretrained(load_sharded(folder, device), tokenizer, tmp_path / "saved")
    saved = GenerationConfig.from_pretrained(tmp_path / "saved")
    assert saved.do_sample and saved.temperature == 0.9 and saved.top_p == 0.6


def test_what_could_not_be_saved_is_refused_at_once_with_the_whole_reason(tiny_model, tmp_path, monkeypatch):
    def refuse(*_, **__):
        raise ValueError("two lines\nof reason")

    monkeypatch.setattr(GenerationConfig, "save_pretrained", refuse)
    with pytest.raises(ValueError, match="could not be saved after training: two lines of reason"):
        pretrained.load_tokenizer(settings(tiny_model))


def test_generation_defaults_that_cannot_be_read_are_refused_by_name(tiny_model, tmp_path):
    folder = tmp_path / "model"
    shutil.copytree(tiny_model, folder)
    (folder / "generation_config.json").write_text('{"early_stopping": "perhaps"}')
    with pytest.raises(ValueError, match="generation_config.json is refused .*early_stopping"):
        pretrained.load_tokenizer(settings(folder))


def test_a_model_without_eos_needs_a_stop_string(tiny_model, tmp_path):
    folder = tmp_path / "model"
    shutil.copytree(tiny_model, folder)
    for name in ("config.json", "generation_config.json", "tokenizer_config.json"):
        content = json.loads((folder / name).read_text())
        (folder / name).write_text(json.dumps(content | {"eos_token_id": None, "eos_token": None}))
    with pytest.raises(ValueError, match="has no EOS token: no response would end; name a --stop"):
        pretrained.load_tokenizer(settings(folder))
    pretrained.load_tokenizer(SimpleNamespace(**vars(settings(folder)), stop="#"))


def test_the_fingerprint_of_a_model_sees_other_weights(tiny_model, tmp_path):
    folder = tmp_path / "model"
    shutil.copytree(tiny_model, folder)
    before = model_files.fingerprint(tiny_model)
    assert model_files.fingerprint(folder) == before
    content = bytearray((folder / "model.safetensors").read_bytes())
    content[-1] ^= 1
    (folder / "model.safetensors").write_bytes(content)
    assert model_files.fingerprint(folder) != before


REFUSED = {
    "Gemma 2": "its configuration has final_logit_softcapping",
    "Cohere": "its configuration has logit_scale",
    "Granite 3": "its configuration has logits_scaling",
    "StableLM": "is not told where packed sequences begin",
    "Mixtral": "transformers packs the 41 tensors of its files into 21, which the engine does not take",
    "Qwen3-MoE": "transformers packs the 45 tensors of its files into 25, which the engine does not take",
    "Mamba 2": "0 of its 2 layers have attention, the others would mix packed sequences",
    "LFM2": "1 of its 2 layers have attention, the others would mix packed sequences",
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_could_not_be_trained_right_is_refused_before_anything_loads(name, tmp_path):
    write_model(name, tmp_path)
    with pytest.raises(ValueError) as error:
        check_supported(tmp_path)
    assert REFUSED[name] in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize("name", sorted(set(FAMILIES) - set(REFUSED)))
def test_what_can_be_trained_passes_the_same_check(name, tmp_path):
    write_model(name, tmp_path)
    check_supported(tmp_path, [[0, 31], [5]])
    with pytest.raises(ValueError, match="its tokenizer gives id 32, its embedding has 32 rows"):
        check_supported(tmp_path, [[0, 31], [5, 32]])


@pytest.mark.parametrize("name", ["SmolLM3", OWN_LAYOUT])
def test_what_vllm_would_load_in_its_own_way_trains_and_syncs(name):
    """Of SmolLM3 it takes transformers' class, and changes it; beside Mistral's layout it prefers that."""
    done = python("experiments/families.py", name)
    assert done.returncode == 0, done.stderr
    row = done.stdout.splitlines()[-1].strip("| ").split(" | ")
    assert row[0] == name and float(row[2]) < GAP, row


def test_a_hub_name_that_cannot_be_reached_says_what_is_waited_for(monkeypatch, capsys):
    def unreachable(*_, **__):
        raise OSError("We couldn't connect\nto the hub")

    monkeypatch.setattr(pretrained.AutoConfig, "from_pretrained", unreachable)
    with pytest.raises(ValueError, match=r"--model own/model cannot be loaded: .*\(We couldn't connect\)"):
        pretrained.load_tokenizer(settings("own/model"))
    assert capsys.readouterr().out == "looking for --model own/model on the hub\n"


def test_no_layer_is_dropped_in_training(tmp_path, device):
    """OPT's layerdrop, like dropout: the old and the new log-probabilities are of one policy."""
    write_model("OPT", tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"layerdrop": 0.5, "dropout": 0.1}))
    network = load_sharded(tmp_path, device).network
    assert network.training and network.config.layerdrop == network.config.dropout == 0.0
    assert network.base_model.decoder.layerdrop == 0.0
