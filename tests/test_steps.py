"""Where responses are cut, on real and on arbitrary text; the same boundaries in token ids."""

import math
import time
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from steps import check_rule, split_steps, step_boundaries, token_boundaries, token_starts
from vine import token_advantages

# --- tokens ---

TEXTS = [
    "Let $x=5$. Then we add two.\nSo 72 eggs cost \\$3.\n\nThe naïve café paid €5 — déjà vu.\n#### 72",
    "日本語の文。次の文です。🎉🎉 The end. 👩‍👩‍👧 Ω ≈ 3.\nNow £4.",
]


@pytest.fixture(scope="module", params=["byte-level BPE", "SentencePiece style BPE"])
def bpe(request):
    """A BPE tokenizer trained on ASCII only, so that other characters fall apart into byte tokens."""
    words = ["the end of the eggs costs 72 and then some more.", "So we add two", "Let x be five. Then"] * 5
    if request.param.startswith("byte"):
        tokenizer = Tokenizer(models.BPE())
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        tokenizer.decoder = decoders.ByteLevel()
        trainer = trainers.BpeTrainer(vocab_size=400, initial_alphabet=pre_tokenizers.ByteLevel.alphabet())
        tokenizer.train_from_iterator(words, trainer)
        return tokenizer
    characters = sorted(set("▁\n" + "".join(chr(c) for c in range(33, 127))))
    vocabulary = ["<unk>", *(f"<0x{b:02X}>" for b in range(256)), *characters, "▁t", "▁th", "▁the"]
    merges = [("▁", "t"), ("▁t", "h"), ("▁th", "e")]
    tokenizer = Tokenizer(
        models.BPE({t: i for i, t in enumerate(vocabulary)}, merges, unk_token="<unk>", byte_fallback=True)
    )
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return tokenizer


@pytest.mark.parametrize("text", TEXTS)
def test_every_character_belongs_to_the_token_that_holds_its_first_byte(bpe, text):
    ids = bpe.encode(text).ids
    whole = bpe.decode(ids)
    starts = token_starts(ids, bpe.decode)
    assert len(starts) == len(ids) and starts[0] == 0 and starts == sorted(starts)
    assert whole == text
    for i, start in enumerate(starts):
        before = bpe.decode(ids[:i])
        if "\ufffd" not in before:  # whole characters stand before token i: it begins where they end
            complete = len(before)
            assert before == text[:start]
        assert start == complete  # inside a character: that is where the character begins


@pytest.mark.parametrize("text", TEXTS)
def test_step_prefixes_are_sampled_ids_and_cover_the_response(bpe, text):
    eos = bpe.get_vocab_size()
    ids = [*bpe.encode(text).ids, eos]
    starts = token_starts(ids, lambda i: bpe.decode([x for x in i if x != eos]))  # EOS adds no text
    steps = split_steps(text)
    cuts = token_boundaries(steps, starts)
    assert cuts[0] == 0 and cuts[-1] == len(ids) and cuts == sorted(set(cuts))
    assert len(token_advantages(cuts, range(len(cuts) - 1))) == len(ids)
    assert len(cuts) == len(steps)
    for cut, step in zip(cuts[1:-1], steps[1:-1]):
        assert starts[cut - 1] < step <= starts[cut]


def test_a_token_across_a_boundary_belongs_to_the_step_of_its_first_character():
    assert token_boundaries([0, 3, 8], [0, 2, 5, 8]) == [
        0,
        2,
        4,
    ]  # the token at 2..5 begins before 3; the last one is EOS
    assert token_boundaries([0, 3, 4, 8], [0, 2, 6]) == [
        0,
        2,
        3,
    ]  # the step 3..4 has no token of its own
    assert token_boundaries([0], []) == [0]


def test_garbage_bytes_do_not_swallow_the_rest():
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer, tokenizer.decoder = (
        pre_tokenizers.ByteLevel(add_prefix_space=False),
        decoders.ByteLevel(),
    )
    tokenizer.train_from_iterator(
        ["a"], trainers.BpeTrainer(initial_alphabet=pre_tokenizers.ByteLevel.alphabet())
    )
    half = tokenizer.encode("é").ids[:1]
    ids = half * 50 + tokenizer.encode("abc\n").ids
    starts = token_starts(ids, tokenizer.decode)
    assert len(starts) == 54 and starts == sorted(starts) and starts[-1] == len(tokenizer.decode(ids)) - 1


# --- steps ---

STEPS = [  # the steps of a response, concatenated
    ["8*9=72", "\n72+6=78", "\n78-7=71\n#### 71"],
    ["\n\nShe sold 5.  She kept $3.", "\nSo she has $4 left.", "\n\n\nThen 5.\n#### 5"],
    ["Let $x=5$ and $y=3.0$.", " Then $x+y=8$.", "\n\nHence the answer is $\\boxed{8}$."],
    ["We have \\[a. B\n= c.\\]", "Finally, we are done with it."],
    ["By A. B. Smith, i.e. Mr. Jones of St. Louis, it holds.", " Dr. Who agrees with that."],
    ["It costs $5 today, they say.", " Then it rose a lot, by half.", "\nIt was $4 before, we think."],
    ["We use the following list", "\n10. We do this at the beginning", "\n11. We do that at the very end"],
    [
        "[asy]\nunitsize(0.4 cm);",
        "\npair A = (0,0); B = (1,0);",
        '\nlabel("$A$", A, N);\n[/asy]',
        "\nHere $A$ is the origin.",
    ],
    ["The chance of that is \\[", "\n\\frac{1}{3}\\cdot\\frac{1}{3} + x\n\\]"],
    ["It costs \\$5. in all, that is 3.5 dollars.", " Then we pay."],
    [
        "An unclosed $x + 1 and so on.",
        " Then more of it.",
        "\n\nThe next paragraph is free.",
        " It has sentences.",
    ],
]


@pytest.mark.parametrize("steps", STEPS)
def test_steps_of_readable_cases(steps):
    text = "".join(steps)
    cuts = split_steps(text)
    assert [text[a:b] for a, b in zip(cuts, cuts[1:])] == steps


MARKED = (Path(__file__).parent / "math_steps.txt").read_text().removesuffix("\n").split("\n=====\n")


@pytest.mark.parametrize("marked", MARKED, ids=range(len(MARKED)))
def test_steps_of_ten_math_solutions(marked):
    """Solutions of the MATH dataset (Hendrycks et al. 2021, MIT licence); the mark ⏐ begins a step."""
    steps = marked.split("⏐")
    text = "".join(steps)
    cuts = split_steps(text)
    assert [text[a:b] for a, b in zip(cuts, cuts[1:])] == steps


PIECES = [
    "$",
    "$$",
    "\\[",
    "\\]",
    "\\(",
    "\\begin{a}",
    "\\end{a}",
    "[asy]",
    "[/asy]",
    ". ",
    ".",
    "\n",
    " ",
    "A",
    "word ",
    "=",
    ", ",
    "\\",
    "####",
    "é",
    "\x00",
]


@settings(max_examples=400, deadline=None)
@given(st.one_of(st.text(), st.lists(st.sampled_from(PIECES), max_size=200).map("".join)))
def test_boundaries_strictly_increase_over_any_text(text):
    cuts = split_steps(text)
    assert cuts[0] == 0 and cuts[-1] == len(text)
    assert all(a < b for a, b in zip(cuts, cuts[1:]))


@pytest.mark.parametrize(
    "piece",
    [
        "\n",
        " ",
        "$",
        "\\[",
        "\\begin{a}",
        "\\begin{aaa",
        ". A",
        "a = b, ",
        "[asy]",
        "\\",
        "\n \n",
        "####",
        "A.",
        "(",
        "\n$ x. A",
        "\\]A.",
    ],
)
def test_time_is_linear_in_the_length(piece):
    for before, after in (("x", "x"), ("$x", "$ x"), ("x\\[", "\\]")):
        text = before + piece * (100_000 // len(piece)) + after
        start = time.process_time()
        cuts = split_steps(text)
        assert cuts[-1] == len(text)
        assert (
            time.process_time() - start < 20
        )  # of the CPU; quadratic time would be minutes, linear is a fraction of a second


def test_step_credit_rules():
    text = "It is 5. So\nthe sum is 9.\n\n#### 9"
    ids = [*map(ord, text), 0]

    def pieces(rule):
        cuts = step_boundaries(rule, text, ids, lambda i: "".join(map(chr, filter(None, i))))
        assert cuts[0] == 0 and cuts[-1] == len(ids)
        return ["".join(map(chr, ids[a:b])) for a, b in zip(cuts, cuts[1:])]

    assert pieces("newline") == ["It is 5. So", "\nthe sum is 9.", "\n\n#### 9\0"]
    assert pieces("sentence") == ["It is 5.", " So\nthe sum is 9.\n\n#### 9\0"]
    assert pieces("tokens:20") == [text[:20], text[20:] + "\0"]
    assert pieces("tokens:99") == [text + "\0"]
    assert len(pieces("paper")) == len(split_steps(text)) - 1
    assert step_boundaries("tokens:3", "", [], None) == [0]
    for rule in ("line", "tokens:0", "tokens:", "tokens:1.5", "cutpoints", "cutpoints:0"):
        with pytest.raises(
            ValueError, match="use paper, newline, sentence, tokens:N as in tokens:100, or cut"
        ):
            check_rule(rule)


@pytest.mark.parametrize("n, expected", [(1, [0, 2, 3, 6]), (2, [0, 3, 6]), (3, [0, 6]), (9, [0, 6])])
def test_cutpoints_are_behind_every_nth_token_that_the_policy_was_not_sure_of(n, expected):
    logprobs = [math.log(p) for p in (0.95, 0.5, 0.89, 0.91, 1.0, 0.3)]  # unsure: tokens 1, 2 and 5
    assert step_boundaries(f"cutpoints:{n}", "abcdef", [1] * 6, None, logprobs) == expected
    check_rule(f"cutpoints:{n}")
    assert step_boundaries("cutpoints:2", "", [], None, None) == [0]  # a response that the engine gave up
