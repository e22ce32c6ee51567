"""The estimator against a task whose values are known exactly."""

import itertools
import math
import random
import statistics
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
from hypothesis import given
from hypothesis import strategies as st

import vine
from episode import Completion, Episode

# The coin task: a response is five flips of a coin that shows 1 with probability P, rewarded when at
# least three are 1.

P, FLIPS = 0.4, 5


def exact_value(prefix):
    if len(prefix) == FLIPS:
        return float(sum(prefix) >= 3)
    return P * exact_value([*prefix, 1]) + (1 - P) * exact_value([*prefix, 0])


def flip_on(prefix, rng):
    return prefix + [int(rng.random() < P) for _ in range(FLIPS - len(prefix))]


def estimates(k, repeats, rng):
    """Estimates of each state's value on the fixed response 1 0 1 0 1, `repeats` times:
    [repeats][state].
    """
    episode = Episode([9], response_ids=[1, 0, 1, 0, 1], boundaries=list(range(FLIPS + 1)))
    states, result = vine.states_of(episode, {}), []
    for _ in range(repeats):
        rewards = [[float(sum(flip_on(state.prefix_ids, rng)) >= 3) for _ in range(k)] for state in states]
        result.append([vine.monte_carlo_value(r) for r in rewards])
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
def test_steps_beyond_the_cap_have_no_advantage_and_the_junction_carries_the_difference(reward):
    advantages = vine.step_advantages([0.25, 0.5], reward)  # of four steps, the first two states are valued
    assert vine.token_advantages([0, 1, 3, 4, 6], advantages) == [0.25] + [reward - 0.5] * 2 + [0.0] * 3


@given(st.lists(st.floats(0, 1), max_size=6), st.floats(-2, 2))
def test_without_averages_the_advantages_are_the_papers_to_the_last_digit(values, reward):
    paper = [after - before for before, after in zip(values, [*values, reward][1:])]
    assert vine.step_advantages(values, reward) == paper
    assert vine.averaged_advantages(values, reward) == (
        paper,
        [*values, reward][1:] if values else [],
        values,
    )


def test_targets_and_baselines_are_averages_of_what_comes_after_and_before():
    values, lam, m = [0.5, 0.25, 0.75], 0.5, 0.25
    advantages, targets, baselines = vine.averaged_advantages(values, 1.0, lam, m)
    assert targets == [0.5 * 0.25 + 0.25 * 0.75 + 0.25 * 1.0, 0.5 * 0.75 + 0.5, 1.0]
    assert baselines == [0.5, 0.75 * 0.25 + 0.25 * 0.5, 0.75 * 0.75 + 0.25 * (0.75 * 0.25 + 0.25 * 0.5)]
    assert advantages == [g - b for g, b in zip(targets, baselines)]


# A smaller coin task, of which every outcome is counted: three flips, rewarded when two or more are 1.
# The policy's one parameter is the logit of P: d log pi(flip) = flip - P.


def outcomes(flips):
    """(flips, probability) of all results of so many flips."""
    for found in itertools.product((0, 1), repeat=flips):
        yield list(found), math.prod(P if flip else 1 - P for flip in found)


def expected_gradient(settings):
    """The mean over everything that can happen of sum_t A_t d log pi(flip t), for a response with a rollout
    (K = 1) from each of its states.
    """
    total = mass = 0.0
    for response, p_response in outcomes(3):
        estimator = vine.Vine(None, None, SimpleNamespace(**settings))
        e = Episode([9], response_ids=response, boundaries=[0, 1, 2, 3], reward=float(sum(response) >= 2))
        states = vine.states_of(e, estimator.known, settings["cap"])
        for rollouts in itertools.product(*(outcomes(3 - len(state.prefix_ids)) for state in states)):
            estimator.known = dict(enumerate(states))
            for state, (ids, _) in zip(states, rollouts):
                right = float(sum(state.prefix_ids + ids) >= 2)
                state.rollouts = [Completion(ids, "", True, None, reward=right)]
            estimator.set_advantages([e])
            weight = p_response * math.prod(p for _, p in rollouts)
            mass += weight
            total += weight * sum(a * (flip - P) for a, flip in zip(e.advantages, response, strict=True))
    assert mass == pytest.approx(1)
    return total


def true_gradient(steps=3):
    """Of the expected reward, as far as it comes from the first `steps` flips."""
    return sum(p * (sum(ids) >= 2) * sum(flip - P for flip in ids[:steps]) for ids, p in outcomes(3))


SETTINGS = [(lam, m) for lam in (0.0, 0.5, 1.0) for m in (0.0, 0.5, 1.0)]


@pytest.mark.parametrize("cap", [None, 2])
@pytest.mark.parametrize("lam, m", SETTINGS)
def test_the_gradient_is_unbiased_whatever_is_averaged(lam, m, cap):
    settings = dict(gae_lambda=lam, baseline_smoothing=m, cap=cap)
    assert true_gradient() == pytest.approx(6 * P * (1 - P) * P * (1 - P))  # P(1-P) d/dP of 3P^2 - 2P^3
    assert expected_gradient(settings) == pytest.approx(true_gradient(cap or 3), rel=1e-9)


def test_each_distinct_state_is_estimated_once():
    episodes = [
        Episode([1, 2], response_ids=[5, 6, 7, 8], boundaries=[0, 2, 3, 4]),
        Episode([1, 2], response_ids=[5, 6, 9], boundaries=[0, 2, 3]),
        Episode([1, 3], response_ids=[5, 6, 7], boundaries=[0, 2, 3]),
    ]
    known = {}
    new = [vine.states_of(e, known) for e in episodes]
    assert [len(found) for found in new] == [3, 0, 2] and sum(new, []) == list(known.values())
    states = [e.states for e in episodes]
    assert states[0][:2] == states[1]  # the prompt and the shared first step
    # tokens behind each in the response that had it first
    assert [state.tokens_left for state in states[0]] == [4, 2, 1]
    for e, row in zip(episodes, states):
        for state, cut in zip(row, e.boundaries[:-1], strict=True):
            assert (state.prompt_ids, state.prefix_ids) == (e.prompt_ids, e.response_ids[:cut])
    for e in episodes:
        assert vine.states_of(e, {}, max_steps=1) == e.states and [s.prefix_ids for s in e.states] == [[]]


def test_states_of_one_problem_with_two_gold_answers_are_two():
    known = {}
    for answer in ("7", "8"):
        e = Episode([1, 2], answer=answer, response_ids=[5, 6], boundaries=[0, 1, 2])
        assert [state.answer for state in vine.states_of(e, known)] == [answer] * 2
    assert len(known) == 4


def test_importing_the_estimator_and_the_update_imports_no_vllm():
    code = "import sys, vine, ppo, steps, grader, model; sys.exit('vllm' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=Path(vine.__file__).parent).returncode == 0
