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
from tokenizers import Tokenizer
from tokenizers.processors import TemplateProcessing
from transformers import AutoConfig, AutoTokenizer, GenerationConfig

FILES = ["*.safetensors", "*.json", "*.txt", "*.model", "*.jinja", "*.py"]
PICKLES = "pytorch_model*.bin"
PROBE = "Problem:\nFind  x^2 if $\\alpha$, α = 1234.5.\n\n\tSolution: It's 3 + 4 = 7.\n#### 7"


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
        tokenizer = read_tokenizer(path, trust)
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
    about = f"the weights of {model} are converted to safetensors"
    return made_once((str(folder.resolve()), files), about, lambda draft: convert(folder, pickles, draft))


def read_tokenizer(model, trust_remote_code=False):
    """A model's tokenizer, nothing else of it checked."""
    folder = tokenizer_folder(model, trust_remote_code)
    return AutoTokenizer.from_pretrained(folder, trust_remote_code=trust_remote_code)


@cache
def tokenizer_folder(model, trust_remote_code=False):
    """The folder from which AutoTokenizer reads a model's tokenizer as transformers 4 did.

    Where AutoTokenizer would read it otherwise from the model's own folder, it is a folder with the
    tokenizer alone, which names no class; the own one again, where that does not help. Code of a model's
    own is left to itself. Raises OSError and ValueError as local_folder and AutoTokenizer do.
    """
    folder = Path(local_folder(model))
    stored, config = folder / "tokenizer.json", folder / "tokenizer_config.json"
    settings = json.loads(config.read_text()) if config.is_file() else {}
    if not stored.is_file() or "auto_map" in settings:
        return str(folder)
    built = AutoTokenizer.from_pretrained(folder, trust_remote_code=trust_remote_code)
    right = as_transformers_4(stored, settings, built.bos_token)
    if reads_alike(built, right):
        return str(folder)

    classless = json.dumps(settings | {"tokenizer_class": "TokenizersBackend"})

    def make(draft):
        draft.mkdir()
        for name in ("special_tokens_map.json", "added_tokens.json", "chat_template.jinja"):
            if (folder / name).is_file():
                shutil.copy(folder / name, draft)
        right.save(str(draft / "tokenizer.json"))
        (draft / "tokenizer_config.json").write_text(classless)
        # AutoTokenizer knows classes by the type of the model, too: none for llama
        (draft / "config.json").write_text('{"model_type": "llama"}')

    otherwise = f"{type(built).__name__}, which reads text otherwise than tokenizer.json says"
    about = f"the tokenizer of {model} is copied without its class {otherwise}"
    copy = made_once(("tokenizer", right.to_str(), classless), about, make)
    return copy if reads_alike(AutoTokenizer.from_pretrained(copy), right) else str(folder)


def as_transformers_4(stored, settings, bos):
    """What tokenizer.json says as a whole, and the BOS that Llama's class added where its settings said so.

    stored: the path of tokenizer.json; settings: of tokenizer_config.json; bos: a token's text or None. Of
    some classes transformers 5 takes the vocabulary from that file and builds the rest itself. A byte-level
    tokenizer that is labelled LlamaTokenizer, as DeepSeekMath's, loses spaces, newlines and BOS (its issues
    45488 and 48206).
    """
    tokenizer = Tokenizer.from_file(str(stored))
    tokenizer.no_padding()
    tokenizer.no_truncation()
    if str(settings.get("tokenizer_class")).startswith("LlamaTokenizer") and "add_bos_token" in settings:
        number = tokenizer.token_to_id(bos) if bos and settings["add_bos_token"] else None
        first, special = ("$A", []) if number is None else (f"{bos} $A", [(bos, number)])
        tokenizer.post_processor = TemplateProcessing(first, special_tokens=special)
    return tokenizer


def reads_alike(built, right):
    """Whether a tokenizer of transformers gives the ids and the text of one of tokenizers."""
    ids = right.encode(PROBE).ids
    text = built.decode(ids, clean_up_tokenization_spaces=False)
    return built.encode(PROBE) == ids and text == right.decode(ids, skip_special_tokens=False)


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
