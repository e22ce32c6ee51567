"""The estimator against a task whose values are known exactly; steps and tokens on real and on arbitrary text."""

import random
import statistics
import subprocess
import sys
import time
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

import vine

# --- the coin task: a response is five flips of a coin that shows 1 with probability P, rewarded when at least three are 1 -----------

P, FLIPS = 0.4, 5


def exact_value(prefix):
    if len(prefix) == FLIPS:
        return float(sum(prefix) >= 3)
    return P * exact_value([*prefix, 1]) + (1 - P) * exact_value([*prefix, 0])


def flip_on(prefix, rng):
    return prefix + [int(rng.random() < P) for _ in range(FLIPS - len(prefix))]


def estimates(k, repeats, rng):
    """Estimates of each state's value on the fixed response 1 0 1 0 1, `repeats` times: [repeats][state]."""
    response = [1, 0, 1, 0, 1]
    numbers = {}
    indices = vine.number_states(numbers, [9], response, list(range(FLIPS + 1)))
    result = []
    for _ in range(repeats):
        rewards = [[float(sum(flip_on(list(prefix), rng)) >= 3) for _ in range(k)] for _, prefix in numbers]
        values = vine.monte_carlo_values(rewards)
        result.append([values[i] for i in indices])
    return result


@pytest.mark.parametrize("k", [1, 3, 9])
def test_values_are_unbiased_and_their_variance_falls_as_one_over_k(k):
    repeats = 4000
    columns = list(zip(*estimates(k, repeats, random.Random(k))))
    for t, column in enumerate(columns):
        truth = exact_value([1, 0, 1, 0, 1][:t])
        variance = truth * (1 - truth) / k  # of the mean of k Bernoulli rewards
        assert abs(statistics.mean(column) - truth) < 4.5 * (variance / repeats) ** 0.5
        assert statistics.variance(column) == pytest.approx(variance, rel=0.15)


def test_advantages_are_unbiased_for_the_true_ones_and_telescope():
    response, reward = [1, 0, 1, 0, 1], 1.0
    truth = [exact_value(response[:t]) for t in range(FLIPS)] + [reward]
    sampled = [vine.step_advantages(values, reward) for values in estimates(3, 4000, random.Random(0))]
    for t in range(FLIPS):
        assert statistics.mean(a[t] for a in sampled) == pytest.approx(truth[t + 1] - truth[t], abs=0.03)
    for values in estimates(3, 20, random.Random(1)):
        assert sum(vine.step_advantages(values, reward)) == pytest.approx(reward - values[0])


@pytest.mark.parametrize("reward", [0.0, 1.0])
def test_states_beyond_the_cap_have_no_advantage_and_the_junction_carries_the_difference(reward):
    advantages = vine.step_advantages([0.25, 0.5, None, None], reward)
    assert advantages == [0.25, reward - 0.5, 0.0, 0.0]


def test_each_distinct_state_is_estimated_once():
    prompts, responses = [[1, 2], [1, 2], [1, 3]], [[5, 6, 7, 8], [5, 6, 9], [5, 6, 7]]
    boundaries, numbers = [[0, 2, 3, 4], [0, 2, 3], [0, 2, 3]], {}
    indices = [vine.number_states(numbers, *r) for r in zip(prompts, responses, boundaries)]
    states = list(numbers)
    assert list(numbers.values()) == list(range(5))
    assert indices[0][:2] == indices[1]  # the prompt and the shared first step
    for prompt, response, cuts, row in zip(prompts, responses, [[0, 2, 3], [0, 2], [0, 2]], indices):
        assert [states[i] for i in row] == [(tuple(prompt), tuple(response[:cut])) for cut in cuts]
    capped = [vine.number_states({}, *r, max_steps=1) for r in zip(prompts, responses, boundaries)]
    assert all(row == [0, *[None] * (len(row) - 1)] for row in capped)


# --- tokens -----------------------------------------------------------------------------------------------------------------------

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
    tokenizer = Tokenizer(models.BPE({t: i for i, t in enumerate(vocabulary)}, merges, unk_token="<unk>", byte_fallback=True))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)])
    return tokenizer


@pytest.mark.parametrize("text", TEXTS)
def test_every_character_belongs_to_the_token_that_holds_its_first_byte(bpe, text):
    ids = bpe.encode(text).ids
    whole = bpe.decode(ids)
    starts = vine.token_starts(ids, bpe.decode)
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
    starts = vine.token_starts(ids, lambda i: bpe.decode([x for x in i if x != eos]))  # EOS adds no text
    steps = vine.split_steps(text)
    cuts = vine.token_boundaries(steps, starts)
    assert cuts[0] == 0 and cuts[-1] == len(ids) and cuts == sorted(set(cuts))
    assert len(vine.token_advantages(cuts, range(len(cuts) - 1))) == len(ids)
    assert len(cuts) == len(steps)
    for cut, step in zip(cuts[1:-1], steps[1:-1]):
        assert starts[cut - 1] < step <= starts[cut]


def test_a_token_across_a_boundary_belongs_to_the_step_of_its_first_character():
    assert vine.token_boundaries([0, 3, 8], [0, 2, 5, 8]) == [0, 2, 4]  # the token at 2..5 begins before 3; the last one is EOS
    assert vine.token_boundaries([0, 3, 4, 8], [0, 2, 6]) == [0, 2, 3]  # the step 3..4 has no token of its own
    assert vine.token_boundaries([0], []) == [0]


def test_garbage_bytes_do_not_swallow_the_rest():
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    tokenizer.train_from_iterator(["a"], trainers.BpeTrainer(initial_alphabet=pre_tokenizers.ByteLevel.alphabet()))
    half = tokenizer.encode("é").ids[:1]
    ids = half * 50 + tokenizer.encode("abc\n").ids
    starts = vine.token_starts(ids, tokenizer.decode)
    assert len(starts) == 54 and starts == sorted(starts) and starts[-1] == len(tokenizer.decode(ids)) - 1


# --- steps ------------------------------------------------------------------------------------------------------------------------

STEPS = [  # the steps of a response, concatenated
    ["8*9=72", "\n72+6=78", "\n78-7=71\n#### 71"],
    ["\n\nShe sold 5.  She kept $3.", "\nSo she has $4 left.", "\n\n\nThen 5.\n#### 5"],
    ["Let $x=5$ and $y=3.0$.", " Then $x+y=8$.", "\n\nHence the answer is $\\boxed{8}$."],
    ["We have \\[a. B\n= c.\\]", "Finally, we are done with it."],
    ["By A. B. Smith, i.e. Mr. Jones of St. Louis, it holds.", " Dr. Who agrees with that."],
    ["It costs $5 today, they say.", " Then it rose a lot, by half.", "\nIt was $4 before, we think."],
    ["We use the following list", "\n10. We do this at the beginning", "\n11. We do that at the very end"],
    ["[asy]\nunitsize(0.4 cm);", "\npair A = (0,0); B = (1,0);", '\nlabel("$A$", A, N);\n[/asy]', "\nHere $A$ is the origin."],
    ["The chance of that is \\[", "\n\\frac{1}{3}\\cdot\\frac{1}{3} + x\n\\]"],
    ["It costs \\$5. in all, that is 3.5 dollars.", " Then we pay."],
    ["An unclosed $x + 1 and so on.", " Then more of it.", "\n\nThe next paragraph is free.", " It has sentences."],
]


@pytest.mark.parametrize("steps", STEPS)
def test_steps_of_readable_cases(steps):
    text = "".join(steps)
    cuts = vine.split_steps(text)
    assert [text[a:b] for a, b in zip(cuts, cuts[1:])] == steps


MARKED = (Path(__file__).parent / "math_steps.txt").read_text().removesuffix("\n").split("\n=====\n")


@pytest.mark.parametrize("marked", MARKED, ids=range(len(MARKED)))
def test_steps_of_ten_math_solutions(marked):
    """Solutions of the MATH dataset (Hendrycks et al. 2021, MIT licence); the mark ⏐ begins a step."""
    steps = marked.split("⏐")
    text = "".join(steps)
    cuts = vine.split_steps(text)
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
    cuts = vine.split_steps(text)
    assert cuts[0] == 0 and cuts[-1] == len(text)
    assert all(a < b for a, b in zip(cuts, cuts[1:]))


@pytest.mark.parametrize(
    "piece",
    ["\n", " ", "$", "\\[", "\\begin{a}", "\\begin{aaa", ". A", "a = b, ", "[asy]", "\\", "\n \n", "####", "A.", "(", "\n$ x. A", "\\]A."],
)
def test_a_hundred_thousand_characters_take_no_time(piece):
    for before, after in (("x", "x"), ("$x", "$ x"), ("x\\[", "\\]")):
        text = before + piece * (100_000 // len(piece)) + after
        start = time.perf_counter()
        cuts = vine.split_steps(text)
        assert cuts[-1] == len(text)
        assert time.perf_counter() - start < 5  # quadratic time would be minutes


def test_importing_vine_and_ppo_imports_no_vllm():
    code = "import sys, vine, ppo; sys.exit('vllm' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=Path(vine.__file__).parent).returncode == 0
