"""The model that a run starts from: its files on this machine, its tokenizer, and what is refused."""

import hashlib
import json
import os
import pickle
import shutil
import tempfile
from functools import cache
from pathlib import Path

import torch
from filelock import FileLock
from huggingface_hub import constants, snapshot_download
from huggingface_hub.utils import disable_progress_bars, enable_progress_bars
from safetensors.torch import save_file
from transformers import AutoConfig, AutoTokenizer, GenerationConfig

FILES = ["*.safetensors", "*.json", "*.txt", "*.model", "*.jinja", "*.py"]
PICKLES = "pytorch_model*.bin"


def check_config(config, path):
    """Raise ValueError for a model whose logits are more than the plain output of its head."""
    for name in ("final_logit_softcapping", "attn_logit_softcapping", "logit_scale", "logits_scaling"):
        if getattr(config, name, None) not in (None, 1.0):
            raise ValueError(f"--model {path}: its configuration has {name}, which is not built here")


def load_tokenizer(s):
    """The tokenizer of s.model, whose files are on this machine then.

    s: settings with dataset, model, max_sequence and perhaps trust_remote_code. Raises ValueError for
    a model that is not there, or that a run could not save at its end.
    """
    path, trust = s.model, getattr(s, "trust_remote_code", False)
    if not path:
        raise ValueError(f"--model is missing: --dataset {s.dataset} has no model of its own")
    here = path.startswith("runs/")  # not a name of the hub
    tuned = path.startswith("runs/sft")
    hint = f"run `python sft.py --dataset {s.dataset} --out {path}` first, or " if tuned else ""
    cannot = f"--model {path} cannot be loaded: {hint}name a Hugging Face folder or hub model"
    if here and not Path(path).is_dir():
        raise ValueError(f"{cannot} (there is no such folder)")
    if not Path(path).is_dir() and os.environ.get("RANK", "0") == "0":
        print(f"looking for --model {path} on the hub", flush=True)
    try:
        config = AutoConfig.from_pretrained(path, trust_remote_code=trust)
    except (OSError, ValueError) as error:
        raise ValueError(f"{cannot} ({str(error).splitlines()[0]})") from None
    limit = getattr(config, "max_position_embeddings", None)
    if limit and s.max_sequence > limit:
        few = f"--max_sequence {s.max_sequence} is more than the {limit} positions of --model {path}"
        raise ValueError(few)
    try:
        tokenizer = AutoTokenizer.from_pretrained(local_folder(path), trust_remote_code=trust)
    except (OSError, ValueError) as error:
        raise ValueError(f"{cannot} ({str(error).splitlines()[0]})") from None
    try:
        generation = generation_config(path)
    except ValueError as error:
        raise ValueError(f"--model {path}: its generation_config.json is refused: {error}") from None
    ends = [getattr(part, "eos_token_id", None) for part in (tokenizer, config, generation)]
    if all(end is None for end in ends) and not getattr(s, "stop", None):
        raise ValueError(f"--model {path} has no EOS token: no response would end; name a --stop")
    with tempfile.TemporaryDirectory() as scratch:
        try:
            for part in filter(None, (config, generation, tokenizer)):
                part.save_pretrained(scratch)
        except Exception as error:
            why = " ".join(str(error).split())
            raise ValueError(f"--model {path} could not be saved after training: {why}") from None
    return tokenizer


def generation_config(path):
    """A model's defaults for generation, or None. With do_sample where it has a temperature.

    Without do_sample transformers reads such a file and refuses to write it.
    """
    try:
        found = GenerationConfig.from_pretrained(local_folder(path))
    except OSError:
        return None
    try:
        found.validate(strict=True)
    except ValueError:
        found.do_sample = True
    return found


@cache
def local_folder(model):
    """The folder of a model, given as a folder or hub name, with its weights in safetensors files.

    A hub model is downloaded to the hub's cache; programs call this first where nothing limits how
    long a download may take. Pickled weights are converted once, into HF_HOME/vineppo. They are read
    with torch.load(weights_only=True), which builds tensors and runs no code. Raises OSError if the
    model is not there, ValueError for weights of another kind or a pickle with more than tensors.
    """
    folder = Path(model)
    if not folder.is_dir():
        folder = download(model, FILES)
        if not any(folder.glob("*.safetensors")):
            download(model, PICKLES)
    if any(folder.glob("*.safetensors")):
        return str(folder)
    pickles = sorted(folder.glob(PICKLES))
    if not pickles:
        raise ValueError(f"{model} has no weights: neither *.safetensors nor {PICKLES}")
    files = [(file.name, file.stat().st_size, file.stat().st_mtime_ns) for file in pickles]
    key = hashlib.sha256(repr((str(folder.resolve()), files)).encode()).hexdigest()[:16]
    converted = Path(constants.HF_HOME) / "vineppo" / key
    converted.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(f"{converted}.lock"):  # one rank of a machine converts, the others wait
        if not converted.is_dir():
            print(f"converting the weights of {model} to safetensors, into {converted}", flush=True)
            draft = Path(f"{converted}.unfinished")
            shutil.rmtree(draft, ignore_errors=True)
            convert(folder, pickles, draft)
            draft.rename(converted)
    return str(converted)


def fingerprint(model):
    """A hash of the sizes of a model's weights and of three blocks of each file."""
    found, block = hashlib.sha256(), 2**20
    for path in sorted(Path(local_folder(model)).glob("*.safetensors")):
        size = path.stat().st_size
        found.update(repr((path.name, size)).encode())
        with open(path, "rb") as file:
            for start in (0, size // 2, max(0, size - block)):
                file.seek(start)
                found.update(file.read(block))
    return found.hexdigest()


def download(model, patterns):
    """Files of a hub model, without subfolders and Mistral's second copy of the weights: the folder.

    One rank of a machine shows bars.
    """
    if os.environ.get("LOCAL_RANK", "0") == "0":
        enable_progress_bars()
    try:
        return Path(
            snapshot_download(str(model), allow_patterns=patterns, ignore_patterns=["*/*", "consolidated*"])
        )
    finally:
        disable_progress_bars()


def convert(folder, pickles, target):
    """Copy a model's files to a new folder, with its pickled weights as safetensors files."""
    target.mkdir()
    for file in folder.iterdir():
        if file.is_file() and file not in pickles:
            shutil.copy(file, target)
    places = {}
    for file in pickles:
        try:
            tensors = torch.load(file, map_location="cpu", weights_only=True)
        except (pickle.UnpicklingError, RuntimeError, EOFError) as error:
            why = str(error).splitlines()[0]
            raise ValueError(f"{file} is refused: it is not a file of tensors alone ({why})") from None
        name = file.name.replace("pytorch_model", "model").replace(".bin", ".safetensors")
        # tied weights share their memory, which safetensors does not store
        save_file(
            {key: x.clone().contiguous() for key, x in tensors.items()}, target / name, {"format": "pt"}
        )
        places |= dict.fromkeys(tensors, name)
    if len(pickles) > 1:
        index = json.dumps({"metadata": {}, "weight_map": places})
        (target / "model.safetensors.index.json").write_text(index)
