"""Whether a model can be trained right, before anything is loaded: its architecture, and all of its tensors."""

from pathlib import Path

import torch
from safetensors import safe_open
from transformers import AttentionInterface, AutoModelForCausalLM
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import convert_and_load_state_dict_in_model, revert_weight_conversion
from transformers.modeling_utils import LoadStateDictConfig
from transformers.models.auto.modeling_auto import MODEL_FOR_TOKEN_CLASSIFICATION_MAPPING_NAMES

from support.model_files import in_one_line, local_folder, weight_files
from support.pretrained import read_config


def check_supported(path, sequences=(), trust_remote_code=False, critic=False, tokenizer=None):
    """Raise ValueError for a model that could not be trained right.

    sequences: lists of token ids, which its embedding must have; they are not looked at if it has all tokens of the
    tokenizer. critic: it is PPO's value network, too. Of the weights the names, shapes and types are read, and a
    few rows.
    """
    network = check_architecture(path, sequences, trust_remote_code, critic, tokenizer)
    check_weights(network, path)


def check_architecture(path, sequences=(), trust_remote_code=False, critic=False, tokenizer=None):
    """The network on the meta device, which has shapes and no numbers. Raises ValueError.

    Two packed sequences pass through it, by the attention that model.py registers as "packed".
    """
    config = read_config(path, trust_remote_code)
    refused = f"--model {path} ({config.model_type}) cannot be trained here"
    if critic and config.model_type not in MODEL_FOR_TOKEN_CLASSIFICATION_MAPPING_NAMES:
        raise ValueError(
            f"{refused} with --algorithm ppo: its critic would be a token classifier, and transformers has none of "
            "this architecture"
        )
    config.pad_token_id = None  # some models look for it among the ids
    layers, attentions, packed_attention = config.num_hidden_layers, set(), AttentionInterface()["packed"]

    def attention(module, *tensors, **options):
        attentions.add(module)
        return packed_attention(module, *tensors, **options)

    AttentionInterface.register("counted", attention)
    options = dict(attn_implementation="counted", trust_remote_code=trust_remote_code)
    with torch.device("meta"):
        with in_one_line(f"{refused}: its config.json makes no model"):
            network = AutoModelForCausalLM.from_config(config, **options).requires_grad_(False).eval()
        row, begins = torch.zeros(1, 4, dtype=torch.long), torch.zeros(3, dtype=torch.int32)
        tensors, rows = network.state_dict(), network.get_input_embeddings().num_embeddings
        stored = revert_weight_conversion(network, tensors)
        largest = max(tokenizer.get_vocab().values()) if tokenizer else rows
        if largest >= rows and (largest := max(map(max, sequences), default=0)) >= rows:
            raise ValueError(f"{refused}: its tokenizer gives id {largest}, its embedding has {rows} rows")
        if len(stored) > len(tensors):
            packed = f"transformers packs the {len(stored)} tensors of its files into {len(tensors)}"
            raise ValueError(f"{refused}: {packed}, which the engine does not take (mixture of experts)")
        try:
            network.base_model(row, position_ids=row, use_cache=False, lengths=[2, 2], cu_seqlens=begins)
        except ValueError as error:
            raise ValueError(f"{refused}: {error}") from None
        except RuntimeError:  # it looks at numbers
            return network
    if len(attentions) != layers:
        few = f"{len(attentions)} of its {layers} layers have attention"
        raise ValueError(f"{refused}: {few}, the others would mix packed sequences")
    return network


def check_weights(network, path):
    """Raise ValueError unless the files hold the network's tensors: all of them, these shapes, and no others.

    transformers loads shapes without numbers into the network, by its own rules for old and for tied names; what
    it does not find in the files it would draw at random.
    """
    kind, needed, said = type(network).__name__, network.state_dict(), f"--model {path}: its"
    if not network.config.architectures:
        raise ValueError(f'{said} config.json lacks a line "architectures": ["{kind}"]')
    tensors, files = stored(path)
    rules = LoadStateDictConfig(
        weight_mapping=get_model_conversion_mapping(network),
        ignore_mismatched_sizes=True,
        device_map={"": "meta"},
    )
    found, _ = convert_and_load_state_dict_in_model(network, tensors, rules)
    network.mark_tied_weights_as_initialized(found)
    tied = getattr(network, "all_tied_weights_keys", {})
    for pair in tied.items():
        if not found.missing_keys.issuperset(pair):
            found.missing_keys.difference_update(pair)
    network._adjust_missing_and_unexpected_keys(found)

    buffers = tuple(name for name, x in tensors.items() if x.dim() not in (1, 2))  # masks of old files
    more = sorted(name for name in found.unexpected_keys if not name.endswith(buffers))
    if missing := sorted(found.missing_keys):
        instead = f"; instead they hold {listed(more)}" if more else ""
        tie = ", or set tie_word_embeddings in its config.json if its head is its embedding"
        tie = tie if missing == ["lm_head.weight"] else ""
        raise ValueError(
            f"{said} files lack {listed(missing)}, of the {len(needed)} tensors of {kind}{instead}: copy or save the "
            f"model again{tie}"
        )
    for name, shape, right in sorted(found.mismatched_keys):
        raise ValueError(
            f"{said} files hold {name} as {list(shape)}, its config.json makes it {list(right)}: one of them is of "
            "another model"
        )
    if more:
        raise ValueError(
            f"{said} files hold {listed(more)}, for which {kind} has no place: remove them, or correct its config.json"
        )
    bare = [name for name in tensors if name not in needed and f"model.{name}" in needed]
    if bare and not bare[0].startswith("decoder."):
        raise ValueError(
            f'{said} files hold {listed(bare)} without "model." before the names, which the engine needs: load it '
            "with AutoModelForCausalLM, save it, and name the new folder"
        )
    for name, source in tied.items():
        source = source if source in tensors else source.removeprefix(f"{network.base_model_prefix}.")
        if name in tensors and not (
            source in tensors and torch.equal(*(rows(x, files) for x in (name, source)))
        ):
            what = "different ones" if source in tensors else "the first alone"
            raise ValueError(
                f"{said} config.json says that {name} and {source} are one tensor, its files hold {what}: correct "
                "tie_word_embeddings, or save the model again"
            )


def stored(path):
    """({name: a meta tensor of its shape}, {name: its file}) of a model's files, from their headers."""
    tensors, files = {}, {}
    for file in weight_files(Path(local_folder(path))):
        with (
            in_one_line(f"{file} is cut short or damaged: copy or download it again"),
            safe_open(file, "pt") as f,
        ):
            types = {name: f.get_slice(name) for name in f.keys()}  # noqa: SIM118 (it is no dict)
            tensors |= {name: torch.empty(x.get_shape(), device="meta") for name, x in types.items()}
        for name, x in types.items():
            files[name] = file
            if "weight" in name.split(".")[-1] and x.get_dtype() not in ("F64", "F32", "F16", "BF16"):
                raise ValueError(
                    f"--model {path} is quantized, {name} is stored as {x.get_dtype()}: name the model that it was "
                    "made from, whose weights have 16 or 32 bits"
                )
    return tensors, files


def rows(name, files):
    """Some rows of a stored tensor, from the middle."""
    with safe_open(files[name], "pt") as f:
        tensor = f.get_slice(name)
        half = tensor.get_shape()[0] // 2
        return tensor[half : half + 8]


def listed(names):
    """The first names, and how many there are."""
    return ", ".join(names[:3]) + f" and {len(names) - 3} others" * (len(names) > 3)
