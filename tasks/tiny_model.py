"""The tiny models of the built-in tasks."""

import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast


def write_model(folder, seed, tokens, pattern, **config):
    """Write a Llama with random weights to a folder, and a tokenizer.

    seed: of the weights. tokens: the texts of all tokens except <pad>, <bos>, <eos>. pattern: a regular
    expression that cuts a text into tokens. config: further options of LlamaConfig.
    """
    special = ["<pad>", "<bos>", "<eos>"]
    vocabulary = {token: i for i, token in enumerate([*special, *tokens])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<pad>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(pattern), "isolated")
    tokenizer.decoder = decoders.Fuse()
    tokenizer.post_processor = processors.TemplateProcessing("<bos> $A", special_tokens=[("<bos>", 1)])
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<bos>", eos_token="<eos>"
    ).save_pretrained(folder)
    torch.manual_seed(seed)
    sizes = dict(hidden_size=128, intermediate_size=384, num_attention_heads=4)
    sizes |= dict(vocab_size=len(vocabulary), max_position_embeddings=256, tie_word_embeddings=False)
    ids = dict(pad_token_id=0, bos_token_id=1, eos_token_id=2)
    LlamaForCausalLM(LlamaConfig(**sizes | ids | config)).save_pretrained(folder)
