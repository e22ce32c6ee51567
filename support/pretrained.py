"""What a model's files say: its configuration, its defaults for generation, its tokenizer.

What is wrong with them is said in one line, a ValueError; support/supported.py looks at the weights.
"""

import json
import os
import tempfile
from functools import cache
from pathlib import Path

from tokenizers import Tokenizer
from tokenizers.processors import TemplateProcessing
from transformers import AutoConfig, AutoTokenizer, GenerationConfig, PreTrainedConfig
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from support.model_files import check_files, in_one_line, local_folder, made_once

TOKENIZERS = ("tokenizer.*", "vocab.*", "*.model", "*.tiktoken", "tekken.json")
BESIDE = ("special_tokens_map.json", "added_tokens.json", "chat_template.jinja")
HERE = ("/", ".", "~", "runs/")  # how a path begins that is no name of the hub
PROBE = "Problem:\nFind  x^2 if $\\alpha$, α = 1234.5.\n\n\tSolution: It's 3 + 4 = 7.\n#### 7"


def check_config(config, path):
    """Raise ValueError for a model whose logits are more than the plain output of its head."""
    for name in ("final_logit_softcapping", "attn_logit_softcapping", "logit_scale", "logits_scaling"):
        if getattr(config, name, None) not in (None, 1.0):
            raise ValueError(f"--model {path}: its configuration has {name}, which is not built here")


def check_kind(config, path):
    """Raise ValueError for what is not a causal language model of text, in 16 or 32 bits."""
    if found := getattr(config, "quantization_config", None):
        method = found.get("quant_method") if isinstance(found, dict) else found
        raise ValueError(
            f"--model {path} is quantized ({method}, says its config.json): name the model that it was made from, "
            "whose weights have 16 or 32 bits"
        )
    known, own = MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.get(config.model_type), getattr(config, "auto_map", None)
    named = [name.lower() for name in config.architectures or [known or ""]]
    right = "AutoModelForCausalLM" in (own or {}) or known and known.lower() in named
    if not right or config.is_encoder_decoder or config.get_text_config() is not config:
        what = f"{' '.join(config.architectures or [])} of type {config.model_type} (its config.json)"
        raise ValueError(f"--model {path} is a {what}, not a causal language model of text alone")


def positions(config):
    """How many tokens a sequence may have for engine and trainer alike, or None.

    Past the original positions of a longrope or dynamic rope transformers' frequencies depend on the longest
    sequence of a row, vLLM's do not.
    """
    limit = getattr(config, "max_position_embeddings", None)
    rope = getattr(config, "rope_parameters", None) or {}
    kind, factor = rope.get("rope_type"), rope.get("factor")
    original = rope.get("original_max_position_embeddings")
    with in_one_line(f"the rope parameters of {config.name_or_path} lack a number: {rope}"):
        if kind == "yarn":
            return int(original * factor)
        if kind == "linear":
            return int(limit * factor)
    return original if kind == "longrope" else limit


def read_config(path, trust_remote_code=False):
    """A model's configuration. Raises ValueError if there is none, or one that cannot be trained."""
    if Path(path).is_dir():
        check_files(Path(path))
    with in_one_line(f"--model {path} cannot be loaded: name a Hugging Face folder or hub model"):
        if str(path).startswith(HERE) and not Path(path).is_dir():
            raise ValueError("there is no such folder")
        config = AutoConfig.from_pretrained(path, trust_remote_code=trust_remote_code)
        written, _ = PreTrainedConfig.get_config_dict(path)
    scaling = written.get("rope_scaling")
    if scaling and written.get("rope_parameters") and "rope_theta" not in written | scaling:
        raise ValueError(
            f"--model {path}: its config.json has rope_scaling beside rope_parameters, of which transformers then "
            "forgets rope_theta: write it all into one"
        )
    check_config(config, path)
    check_kind(config, path)
    return config


def load_tokenizer(s):
    """The tokenizer of s.model, whose files are on this machine then.

    s: settings with dataset, model, max_sequence and perhaps trust_remote_code and chat. Raises ValueError for
    a model that is not there, or that a run could not save at its end.
    """
    path, trust = s.model, getattr(s, "trust_remote_code", False)
    if not path:
        raise ValueError(f"--model is missing: --dataset {s.dataset} has no model of its own")
    if path.startswith("runs/sft") and not Path(path).is_dir():
        first = f"run `python sft.py --dataset {s.dataset} --out {path}` first, or name another model"
        raise ValueError(f"--model {path} cannot be loaded: {first} (there is no such folder)")
    if not Path(path).is_dir() and not path.startswith(HERE) and os.environ.get("RANK", "0") == "0":
        print(f"looking for --model {path} on the hub", flush=True)
    config = read_config(path, trust)
    limit = positions(config)
    if limit and s.max_sequence > limit:
        few = f"is more than the {limit} positions of --model {path}"
        raise ValueError(f"--max_sequence {s.max_sequence} {few}")
    tokenizer, generation = read_tokenizer(path, trust), generation_config(path)
    ends = [getattr(part, "eos_token_id", None) for part in (tokenizer, config, generation)]
    ends += [getattr(s, "stop", None) or None, end_of_turn(tokenizer) if getattr(s, "chat", False) else None]
    if all(end is None for end in ends):
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
    file = Path(local_folder(path)) / "generation_config.json"
    if not file.is_file():
        return None
    with in_one_line(f"--model {path}: its generation_config.json is refused"):
        found = GenerationConfig.from_pretrained(file.parent)
    try:
        found.validate(strict=True)
    except ValueError:
        found.do_sample = True
    return found


def read_tokenizer(model, trust_remote_code=False):
    """A model's tokenizer. Raises ValueError for one that reads nothing, since a file of it is missing."""
    folder = Path(tokenizer_folder(model, trust_remote_code))
    names = sorted({file.name for pattern in TOKENIZERS for file in folder.glob(pattern)})
    if not names:
        raise ValueError(
            f"{folder} has no tokenizer (tokenizer.json, tokenizer.model or vocab.json): copy it there"
        )
    with in_one_line(
        f"the tokenizer in {folder} cannot be read from {', '.join(names)}: copy its files again"
    ):
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=trust_remote_code)
        if not tokenizer.encode(PROBE, add_special_tokens=False):
            raise ValueError(f"it has {len(tokenizer)} tokens and reads no text")
    tokenizer.name_or_path = str(model)  # in messages, instead of the copy's folder
    return tokenizer


def end_of_turn(tokenizer):
    """The token that ends an assistant's turn in the tokenizer's chat template, as text, or None.

    Found in a conversation in which the user speaks once more.
    """
    said, ask = "\ue000", {"role": "user", "content": "\ue001"}
    try:
        turns = [ask, {"role": "assistant", "content": said}, ask]
        text = tokenizer.apply_chat_template(turns, tokenize=False)
    except Exception:  # a template of one turn
        return None
    after = text.partition(said)[2].partition("\ue001")[0]
    tokens = [str(token) for token in tokenizer.added_tokens_decoder.values()]
    found = [(after.find(x), -len(x), x) for x in tokens if x.strip() and x in after]
    return min(found)[2] if found else None


@cache
def tokenizer_folder(model, trust_remote_code=False):
    """The folder from which AutoTokenizer reads a model's tokenizer as transformers 4 did.

    Usually the model's own folder. Where AutoTokenizer would misread the tokenizer there, a copy that names no
    tokenizer class, with links to what lies beside it; the own folder again, where that does not help. Code of a
    model's own is left to itself. Raises OSError as local_folder, and ValueError.
    """
    folder = Path(local_folder(model))
    stored, config = folder / "tokenizer.json", folder / "tokenizer_config.json"
    settings = json.loads(config.read_text(encoding="utf-8")) if config.is_file() else {}
    if not stored.is_file() or "auto_map" in settings:
        return str(folder)
    with in_one_line(f"the tokenizer in {folder} cannot be read; is its tokenizer.json whole?"):
        built = AutoTokenizer.from_pretrained(folder, trust_remote_code=trust_remote_code)
        right = as_transformers_4(stored, settings, built.bos_token)
        if reads_alike(built, right):
            return str(folder)

    classless = json.dumps(settings | {"tokenizer_class": "TokenizersBackend"})
    beside = [name for name in BESIDE if (folder / name).exists()]

    def make(draft):
        draft.mkdir()
        for name in beside:
            (draft / name).symlink_to((folder / name).absolute())
        right.save(str(draft / "tokenizer.json"))
        (draft / "tokenizer_config.json").write_text(classless)
        # AutoTokenizer knows classes by the type of the model, too: none for llama
        (draft / "config.json").write_text('{"model_type": "llama"}')

    otherwise = f"{type(built).__name__}, which reads text otherwise than tokenizer.json says"
    about = f"the tokenizer of {model} is copied without its class {otherwise}"
    copy = made_once((str(folder.absolute()), beside, right.to_str(), classless), about, make)
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
