"""The engine against the trainer: same log-probabilities before and after a weight sync, and a
missed sync or a stale cache shows.
"""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import settings
from transformers import AutoModelForCausalLM

import data
import ppo
from episode import Episode, State
from experiments.bench import generate
from learner import micro_batch
from model import full_tensors, load_sharded
from support.run import Run


@pytest.fixture
def models(tiny_model, device, engine):
    """The trainer's model, and a copy with other weights; the engine has the first one's when the
    test begins.
    """
    model, other = load_sharded(tiny_model, device), load_sharded(tiny_model, device)
    with torch.no_grad():
        generator = torch.Generator().manual_seed(7)
        for parameter in other.parameters():
            noise = 0.05 * torch.randn(parameter.to_local().shape, generator=generator)
            parameter.to_local().add_(noise.to(device))
    engine.load_weights(full_tensors(model))
    return model, other


PROMPT = [1, *([5, 13, 6, 15, 7, 17, 8, 18] * 9)]  # longer than a block of the prefix cache


# largest gap of equal weights, and smallest of different ones
EQUAL, DIFFERENT = (0.01, 0.02) if torch.cuda.is_available() else (1e-5, 1e-3)


def gap(engine, model, device, prompt=PROMPT):
    """Mean |engine's - trainer's| log-probability of sampled tokens, as ppo's logprob_gap."""
    differences = []
    for c in generate(engine, [prompt], 8, 24, 0.7, logprobs=True)[0]:
        with torch.no_grad():
            expected = model(micro_batch([Episode(prompt, response_ids=c.token_ids)], [0], device))
        differences.append((expected.cpu() - torch.tensor(c.logprobs)).abs())
    return torch.cat(differences).mean().item()


def test_engine_and_trainer_agree_before_and_after_a_weight_sync(engine, models, device):
    model, other = models
    assert gap(engine, model, device) < EQUAL
    assert gap(engine, other, device) > DIFFERENT  # a missed sync shows
    engine.load_weights(full_tensors(other))
    assert gap(engine, other, device) < EQUAL


def test_a_stale_prefix_cache_would_be_noticed(engine, models, device, monkeypatch):
    model, other = models
    assert gap(engine, model, device) < EQUAL  # the prompt is in the cache now
    with monkeypatch.context() as patch:
        patch.setattr(engine.llm, "reset_prefix_cache", lambda: True)  # forgets to do it
        engine.load_weights(full_tensors(other))
    assert gap(engine, other, device) > DIFFERENT
    engine.load_weights(full_tensors(other))
    assert gap(engine, other, device) < EQUAL


def test_a_refused_reset_of_the_prefix_cache_is_an_error(engine, models, monkeypatch):
    monkeypatch.setattr(engine.llm, "reset_prefix_cache", lambda: False)
    with pytest.raises(RuntimeError, match="prefix cache"):
        engine.load_weights(full_tensors(models[0]))


def test_the_sampled_distribution_is_the_tempered_softmax(engine, models, tiny_model):
    """4,000 first tokens against the exact probabilities at temperature 0.5: a chi-squared test."""
    samples = [c.token_ids[0] for c in generate(engine, [PROMPT], 4000, 1, 0.5)[0]]
    with torch.no_grad():
        p = (
            AutoModelForCausalLM.from_pretrained(tiny_model)(torch.tensor([PROMPT])).logits[0, -1].double()
            / 0.5
        ).softmax(0)
    counts = torch.bincount(torch.tensor(samples), minlength=len(p))
    statistic = ((counts - 4000 * p) ** 2 / (4000 * p)).sum().item()
    assert statistic < 50  # 20 degrees of freedom: exceeded with probability 2e-4


def test_each_prompt_has_its_own_limit_and_completions_say_how_they_ended(engine, models, tokenizer):
    groups = generate(engine, [PROMPT] * 3, 40, [1, 5, 30], 1.0)
    for limit, group in zip([1, 5, 30], groups):
        assert len(group) == 40
        for c in group:
            text = engine.decode(c.token_ids)
            ended = (
                c.token_ids[-1] == tokenizer.eos_token_id or "#" in text
            )  # "#" is the stop string of this engine
            assert c.finished == ended
            assert len(c.token_ids) == limit if not ended else len(c.token_ids) <= limit
    ended = [c for c in groups[2] if c.finished]
    assert any(c.token_ids[-1] == tokenizer.eos_token_id for c in ended)
    assert any("#" in engine.decode(c.token_ids) for c in ended)
    for c in ended:
        assert "#" not in c.text and engine.decode(c.token_ids).startswith(c.text)


def test_prefixes_come_from_the_cache(engine, models):
    looked_up, found = engine.prefix_cache_counts()
    generate(engine, [PROMPT], 1, 2, 1.0)
    generate(engine, [PROMPT + [5, 6]], 1, 2, 1.0)
    after = engine.prefix_cache_counts()
    assert after[0] - looked_up == 2 * len(PROMPT) + 2
    size = engine.llm.llm_engine.vllm_config.cache_config.block_size
    assert after[1] - found == len(PROMPT) // size * size  # whole blocks


def test_requests_may_come_while_others_are_written(engine, models):
    """Greedy, so that each completion can be compared with the one it would have alone."""
    prompts = [[1, 5, 9, 13], PROMPT[:20], [1, 7, 6, 3, 8]]
    alone = generate(engine, prompts, 1, [60, 60, 20], 0.0)
    a, b, late = (State(prompt, []) for prompt in prompts)
    engine.submit(a, 1, 60, 0.0)
    engine.submit(b, 1, 60, 0.0)
    done, start = {}, engine.steps
    while engine.running:
        if engine.steps == start + 3:
            engine.submit(late, 1, 20, 0.0)
        done |= dict(engine.step())
    if not engine.on_gpu:  # there sums depend on the batch, and with them the largest of close logits
        assert [done[record][0].token_ids for record in (a, b, late)] == [c.token_ids for (c,) in alone]
    longest = max(len(c.token_ids) for (c,) in alone)
    assert longest <= engine.steps - start <= longest + 30  # beside each other, not one after the other


def test_what_the_engine_gives_up_is_unfinished_and_counted(engine, models):
    """Requests that vLLM drops with a final output, without one, and beside others that go on."""
    for alone in (True, False):
        before, done, dropped, kept = engine.aborted, {}, State(PROMPT, []), State(PROMPT, [])
        engine.submit(dropped, 3, 60, 1.0)
        if not alone:
            engine.submit(kept, 2, 60, 1.0)
        request_id = next(iter(engine.running))
        done |= dict(engine.step())
        engine.llm.llm_engine.abort_request([request_id])
        while engine.running:
            done |= dict(engine.step())
        assert len(done[dropped]) == 3 and not any(c.finished for c in done[dropped])
        assert engine.aborted - before == 3
        assert alone or len(done[kept]) == 2 and all(c.token_ids for c in done[kept])
    assert not engine.llm.llm_engine.has_unfinished_requests()
    engine.load_weights(full_tensors(models[0]))  # nothing is left running: the cache can be dropped


def test_the_watch_can_give_the_work_up(engine, models):
    class Enough(Exception):
        pass

    def enough():
        if engine.steps == start + 5:
            raise Enough

    start, engine.watch = engine.steps, SimpleNamespace(step=enough)
    engine.submit(State(PROMPT, []), 1, 60, 0.0)
    with pytest.raises(Enough):
        while engine.running:
            engine.step()
    engine.watch = None
    while engine.running:
        engine.step()


def test_samples_depend_on_the_seed_alone(engine, models):
    sample = lambda: [c.token_ids for c in generate(engine, [PROMPT], 20, 8, 1.0)[0]]
    engine.seed(3, 1)
    drawn, first, second = (
        np.random.random(),
        sample(),
        sample(),
    )  # vLLM's sampler on GPUs draws its seeds from numpy
    engine.seed(3, 1)
    assert np.random.random() == drawn and sample() == first != second
    engine.seed(3, 2)
    assert sample() != first


def test_a_prefix_counts_as_part_of_the_response(engine, models):
    """The text begins with it, and a stop string that begins or ends in it ends the response."""
    for prefix, text in (
        ([5, 6], None),
        ([5, engine.tokenizer.convert_tokens_to_ids("#")], engine.decode([5])),
    ):
        state = State(PROMPT, prefix)
        engine.submit(state, 2, 3, 1.0)
        while engine.running:
            for record, completions in engine.step():
                assert record is state  # the engine gives back what it was given
                record.receive(completions)
        for c in state.rollouts:
            whole = engine.decode(prefix + c.token_ids)
            assert c.text == (text if text is not None else whole.split("#")[0]) and (
                text is None or c.finished
            )


def test_requests_wait_outside_of_an_engine_that_is_full(engine, models, monkeypatch):
    monkeypatch.setattr(engine, "max_sequences", 2)
    states = [State(PROMPT, [5 + i]) for i in range(5)]
    for state in states:
        engine.submit(state, 1, 4, 1.0)
    assert [record for record, _ in engine.running.values()] == states[:2]
    assert [record for record, _ in engine.waiting] == states[2:]
    ended = []
    while engine.running:
        ended += [record for record, _ in engine.step()]
        assert len(engine.running) <= 2
    assert sorted(map(states.index, ended)) == list(range(5)) and not engine.waiting


def test_a_model_that_the_engine_computes_otherwise_is_noticed_before_training(
    engine, models, tiny_model, device, capsys, monkeypatch
):
    run = object.__new__(Run)
    run.engine, run.s, run.first = engine, SimpleNamespace(max_tokens=16, seed=0), True
    run.trainer = ppo.Trainer(settings(tiny_model), device)
    problems = [data.Problem("", "", prompt_ids=[1, 5 + i, 9]) for i in range(5)]
    engine.load_weights(run.trainer.weights())
    score, sampled = run.trainer.score, []
    monkeypatch.setattr(
        run.trainer, "score", lambda es: sampled.append([e.response_ids for e in es]) or score(es)
    )
    assert run.agrees(problems) and not capsys.readouterr().out
    monkeypatch.setattr(engine, "number", engine.number + 1)
    assert run.agrees(problems) and len(sampled[0]) == 5 and sampled[0] != sampled[1]
    monkeypatch.setattr(engine, "number", engine.number - 1)
    assert run.agrees(problems) and sampled[0] == sampled[2]
    engine.load_weights(full_tensors(models[1]))  # as of a model whose weights the engine takes otherwise
    assert not run.agrees(problems)
    assert "ENGINE AND TRAINER DISAGREE" in capsys.readouterr().out


def test_a_stop_string_that_is_a_special_token_stops(engine, models, tokenizer):
    """No decoded text has it: it must be a token id."""
    from rollout import stops

    assert stops(SimpleNamespace(stop="#", chat=False), tokenizer) == (["#"], [])
    assert stops(SimpleNamespace(stop=tokenizer.bos_token, chat=False), tokenizer) == (
        [],
        [tokenizer.bos_token_id],
    )
    engine.stop_ids = [7]
    try:
        found = generate(engine, [PROMPT], 40, 30, 1.0)[0]
    finally:
        engine.stop_ids = []
    ended = [c for c in found if 7 in c.token_ids]
    assert ended and all(c.finished and c.token_ids.index(7) == len(c.token_ids) - 1 for c in ended)
