"""The files of a model on this machine: its folder, and which of the files there are its weights.

What is wrong with them is said in one line, a ValueError.
"""

import hashlib
import json
import os
import shutil
from contextlib import contextmanager
from functools import cache
from pathlib import Path

import torch
from filelock import FileLock
from huggingface_hub import constants, snapshot_download
from huggingface_hub.utils import disable_progress_bars, enable_progress_bars
from safetensors.torch import save_file
from transformers.utils import logging

WEIGHTS = "model.safetensors"
FILES = ["*.safetensors", "*.json", "*.txt", "*.model", "*.jinja", "*.py"]
PICKLES = "pytorch_model*.bin"
JSON = ("config", "generation_config", "tokenizer_config", "special_tokens_map", "added_tokens")


@contextmanager
def in_one_line(what):
    """Turn an error of a library into a ValueError of one line; keep transformers' warnings back."""
    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        yield
    except Exception as error:
        first, *rest = [line.strip() for line in str(error).strip().splitlines()] or [""]
        text = f"{first} {rest[0]}" if rest and first.endswith(":") else first
        kind = "" if isinstance(error, OSError | ValueError) else f"{type(error).__name__}: "
        advice = "; add --trust_remote_code if you trust it" if "trust_remote_code" in str(error) else ""
        raise ValueError(f"{what} ({kind}{text[:200]}{advice})") from None
    finally:
        logging.set_verbosity(verbosity)


@cache
def local_folder(model):
    """The folder of a model, given as a folder or hub name, with its weights in safetensors files.

    A hub model is downloaded to the hub's cache; programs call this first where nothing limits how
    long a download may take. Pickled weights are converted once, into HF_HOME/vineppo; beside them, links to the
    model's other files. They are read with torch.load(weights_only=True), which builds tensors and runs no code.
    Where vLLM would read *.safetensors files that transformers does not read, it is a folder of links without them.
    Raises OSError if the model is not there, ValueError for weights of another kind or a pickle with more than tensors.
    """
    folder = Path(model)
    if not folder.is_dir():
        folder = download(model, FILES)
        if not any(folder.glob("*.safetensors")):
            download(model, PICKLES)
    check_files(folder)
    whole = weight_files(folder)
    pickles = [] if whole else weight_files(folder, "pytorch_model.bin") or sorted(folder.glob(PICKLES))
    if not whole and not pickles:
        raise ValueError(
            f"{folder} has no weights: neither {WEIGHTS}, nor its index, nor {PICKLES}; {held(folder)}"
        )
    strays = {*folder.glob("*.safetensors")} - {*whole}
    if whole and (
        not strays or (folder / f"{WEIGHTS}.index.json").exists()
    ):  # vLLM reads what an index names
        return str(folder)
    linked = sorted({file for pattern in FILES for file in folder.glob(pattern)} - strays)

    def make(draft):
        draft.mkdir()
        for file in linked:
            (draft / file.name).symlink_to(file.absolute())
        convert(pickles, draft)

    files = [(file.name, file.stat().st_size, file.stat().st_mtime_ns) for file in pickles]
    key = str(folder.absolute()), files, [file.name for file in linked]
    names = ", ".join(sorted(file.name for file in strays))
    about = "the weights of {} are converted to safetensors" if pickles else f"{{}} is read without {names}"
    return made_once(key, about.format(model), make)


def check_files(folder):
    """Raise ValueError for a folder that is not a Hugging Face model, or where a file is not what its name says."""
    names = sorted(file.name for file in folder.iterdir())
    adapters = [name for name in names if name.startswith(("adapter_config.", "adapter_model."))]
    if adapters:
        raise ValueError(
            f"{folder} holds an adapter ({adapters[0]}): merge it into its base model (peft: merge_and_unload), save "
            "that and its tokenizer, and name the new folder; if it is merged already, remove the adapter's files"
        )
    if "config.json" not in names:
        raise ValueError(f"{folder} is not a Hugging Face model: it has no config.json; {held(folder)}")
    for file in sorted(file for pattern in (*FILES, PICKLES) for file in folder.glob(pattern)):
        if not file.is_file():
            raise ValueError(f"{file} is not a file, or a link to one that is gone: download the model again")
        with open(file, "rb") as opened:
            if opened.read(24) == b"version https://git-lfs.":
                raise ValueError(f"{file} is a Git LFS pointer, not the file: run `git lfs pull` there")
    for file in (folder / f"{name}.json" for name in JSON):
        if file.exists():
            with in_one_line(f"{file} is not a JSON object: copy or download it again"):
                if not isinstance(json.loads(file.read_text(encoding="utf-8")), dict):
                    raise ValueError("it is something else")


def held(folder):
    """What a folder without a model holds, and what to do, in words."""
    models = sorted([*folder.glob("*/config.json"), *folder.glob("*/*/config.json")])
    names = sorted(file.name for file in folder.iterdir())
    if models and "config.json" not in names:
        return f"name a folder inside of it, such as {models[-1].parent}"
    if any(name.endswith(".gguf") for name in names):
        return "GGUF files are for llama.cpp: name the Hugging Face model that they were made from"
    found = [name for name in names if not name.endswith((".json", ".txt", ".md", ".jinja"))] or names
    what = ", ".join(found[:4]) + ", .." * (len(found) > 4) or "nothing"
    return f"it holds {what}: name the model in Hugging Face's layout, with config.json and {WEIGHTS}"


def weight_files(folder, name=WEIGHTS):
    """The files from which transformers reads a model's weights: this one, or those that its index names.

    An empty list if neither is there. Raises ValueError where some are missing, or both are there.
    """
    single, index, named = folder / name, folder / f"{name}.index.json", []
    if index.exists():
        with in_one_line(f"{index} is not an index of weights: copy or download it again"):
            named = sorted({*map(str, json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())})
    elif name == WEIGHTS and not single.exists() and any(folder.glob("model-*-of-*.safetensors")):
        raise ValueError(f"{folder} has parts of the weights, but not their index {index.name}: copy it")
    missing = [x for x in named if not (folder / x).is_file()]
    if missing:
        count = f"{len(missing)} of the {len(named)} files that {index.name} names"
        raise ValueError(f"{folder} lacks {count}, {missing[0]} first: copy or download them")
    if single.exists() and {*named} - {name}:
        sets = f"{name} and the {len(named)} files that {index.name} names"
        raise ValueError(f"{folder} holds two sets of weights, {sets}: remove the one that is old")
    return [folder / x for x in named] or [single] * single.exists()


def made_once(key, about, make):
    """The folder under HF_HOME/vineppo of this key; make(draft) writes it if it is not there.

    One rank of a machine writes it and prints about, what is done; the others wait.
    """
    folder = Path(constants.HF_HOME) / "vineppo" / hashlib.sha256(repr(key).encode()).hexdigest()[:16]
    folder.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(f"{folder}.lock"):
        if not folder.is_dir():
            print(f"{about}: into {folder}", flush=True)
            draft = Path(f"{folder}.unfinished")
            shutil.rmtree(draft, ignore_errors=True)
            make(draft)
            draft.rename(folder)
    return str(folder)


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


def convert(pickles, target):
    """Write pickled weights into a folder, as safetensors files."""
    places = {}
    for file in pickles:
        with in_one_line(f"{file} is refused: it is not a file of tensors alone"):
            tensors = torch.load(file, map_location="cpu", weights_only=True)
            # tied weights share their memory, which safetensors does not store
            tensors = {key: x.clone().contiguous() for key, x in tensors.items()}
        name = file.name.replace("pytorch_model", "model").replace(".bin", ".safetensors")
        save_file(tensors, target / name, {"format": "pt"})
        places |= dict.fromkeys(tensors, name)
    if len(pickles) > 1:
        index = json.dumps({"metadata": {}, "weight_map": places})
        (target / f"{WEIGHTS}.index.json").write_text(index)
