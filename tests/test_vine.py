"""The estimator against a task whose values are known exactly."""

import random
import statistics
import subprocess
import sys
from pathlib import Path

import pytest

import vine
from episode import Episode

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
def test_states_beyond_the_cap_have_no_advantage_and_the_junction_carries_the_difference(reward):
    advantages = vine.step_advantages([0.25, 0.5, None, None], reward)
    assert advantages == [0.25, reward - 0.5, 0.0, 0.0]


def test_each_distinct_state_is_estimated_once():
    episodes = [
        Episode([1, 2], response_ids=[5, 6, 7, 8], boundaries=[0, 2, 3, 4]),
        Episode([1, 2], response_ids=[5, 6, 9], boundaries=[0, 2, 3]),
        Episode([1, 3], response_ids=[5, 6, 7], boundaries=[0, 2, 3]),
    ]
    known = {}
    states = [vine.states_of(e, known) for e in episodes]
    assert [state.number for state in known.values()] == list(range(5))
    assert states[0][:2] == states[1]  # the prompt and the shared first step
    assert [state.rest for state in states[0]] == [
        4,
        2,
        1,
    ]  # tokens behind each in the response that had it first
    for e, row in zip(episodes, states):
        for state, cut in zip(row, e.boundaries[:-1], strict=True):
            assert (state.prompt_ids, state.prefix_ids) == (e.prompt_ids, e.response_ids[:cut])
    for e in episodes:
        first, *others = vine.states_of(e, {}, max_steps=1)
        assert first.prefix_ids == [] and others == [None] * (len(e.boundaries) - 2)


def test_states_of_one_problem_with_two_gold_answers_are_two():
    known = {}
    for answer in ("7", "8"):
        e = Episode([1, 2], answer=answer, response_ids=[5, 6], boundaries=[0, 1, 2])
        assert [state.answer for state in vine.states_of(e, known)] == [answer] * 2
    assert len(known) == 4


def test_importing_the_estimator_and_the_update_imports_no_vllm():
    code = "import sys, vine, ppo, steps, grader, model; sys.exit('vllm' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=Path(vine.__file__).parent).returncode == 0
