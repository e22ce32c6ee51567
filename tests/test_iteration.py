"""One iteration from responses to advantages, with an engine that writes what it is told; dealing;
metrics; warnings.
"""

import json
import math
from collections import deque
from contextlib import nullcontext
from types import SimpleNamespace

import pytest
import torch
from conftest import torchrun
from hypothesis import given
from hypothesis import strategies as st

import train
from data import Problem
from dealing import DealtVine, even_out
from episode import Completion, State
from grader import Grader
from rollout import Engine, episodes_for, sample
from support.metrics import iteration_metrics
from support.run import Run
from support.run_folder import solution


class ScriptedEngine:
    """Token ids are character codes, 0 is EOS.

    Continues each prompt with the text that script(prompt text, k) gives for sample k.

    The latest request ends first. `room`: so many requests run at a time.
    """

    leads, tensor_parallel = True, 1
    advance, take_waiting = Engine.advance, Engine.take_waiting

    def __init__(self, script, number=0, room=10**6):
        self.script, self.number, self.room = script, number, room
        self.requests, self.running, self.waiting = [], {}, deque()

    def decode(self, ids):
        return "".join(chr(i) for i in ids if i)

    def submit(self, record, n, max_tokens, temperature, top_p=1.0, logprobs=False):
        self.waiting.append((record, (n, max_tokens)))
        self.fill()

    def fill(self):
        while self.waiting and len(self.running) < self.room:
            record, (n, max_tokens) = self.waiting.popleft()
            self.running[len(self.requests)] = record, (n, max_tokens)
            self.requests.append((record, n, max_tokens))

    def step(self):
        _, (record, (n, max_tokens)) = self.running.popitem()
        prompt, prefix = self.decode(record.prompt_ids), record.prefix_ids
        first = 0 if isinstance(record, State) else [r for r, *_ in self.requests].index(record)
        completions = [self.complete(prompt, prefix, max_tokens, first + k) for k in range(n)]
        self.fill()
        return [(record, completions)]

    def complete(self, prompt, prefix, limit, k):
        ids = [*map(ord, self.script(prompt + self.decode(prefix), k)), 0]
        finished, ids = len(ids) <= limit, ids[:limit]
        return Completion(ids, self.decode(prefix + ids), finished, [0.0] * len(ids))


def no_phase(name, can_stop=False):
    return nullcontext()


SETTINGS = dict(responses_per_prompt=2, K=4, max_tokens=14, temperature=1.0, top_p=1.0)


def run_iteration(engine, grader, s, problem):
    """The episodes, and their states."""
    vine = DealtVine(engine, grader, s)
    episodes = episodes_for([problem], s.responses_per_prompt)
    sample(engine, grader, episodes, s, on_response=vine.start)
    vine.finish(no_phase)
    vine.set_advantages(episodes)
    assert not vine.known
    return episodes, vine.states


def values(episode):
    return [state.value for state in episode.states]


def test_an_iteration_values_states_by_their_own_rollouts_within_the_limit(device):
    """A chain of three lines, right if the second is "b": V(prompt) = 1/2, V after "a" = 1/2, after
    "b" 1, after "x" 0.
    """

    def script(text, k):
        line = "b" if k % 2 else "x"
        return {"?": f"a\n{line}\nc\n#### {line}", "a": f"\n{line}\nc\n#### {line}"}.get(
            text[-1], f"\nc\n#### {text[-1]}"
        )

    s = train.Settings(**SETTINGS)
    engine, grader, problem = ScriptedEngine(script), Grader(), Problem("?", "b", prompt_ids=[ord("?")])
    episodes, states = run_iteration(engine, grader, s, problem)
    assert [e.reward for e in episodes] == [0.0, 1.0] and all(e.finished for e in episodes)
    responses, rollouts = engine.requests[:2], engine.requests[2:]
    assert [record for record, *_ in responses] == episodes and len(rollouts) == 4
    prefixes = [engine.decode(state.prefix_ids) for state, *_ in rollouts]
    assert sorted(prefixes) == ["", "a", "a\nb", "a\nx"]  # each distinct state once
    assert all(n == 4 and limit == 14 - len(state.prefix_ids) for state, n, limit in rollouts)
    assert all(len(state.rollouts) == 4 for state in states)
    wrong, right = episodes
    assert values(right) == [0.5, 0.5, 1.0] and values(wrong) == [0.5, 0.5, 0.0]
    assert right.advantages == [0.0] * 1 + [0.5] * 2 + [0.0] * 10  # "a", "\nb", "\nc\n#### b" and EOS
    assert wrong.advantages == [0.0] * 1 + [-0.5] * 2 + [0.0] * 10

    stored, stored_wrong = solution(right, engine.decode), solution(wrong, engine.decode)
    assert "".join(step["text"] for step in stored["steps"]) == "a\nb\nc\n#### b" and stored["reward"] == 1.0
    assert [step["advantage"] for step in stored["steps"]] == [0.0, 0.5, 0.0]
    assert not any("target" in step for solution in (stored, stored_wrong) for step in solution["steps"])
    found = [(step["value"], step["right"], step["K"]) for step in stored["steps"]]
    assert found == [(0.5, 2, 4), (0.5, 2, 4), (1.0, 4, 4)]
    assert stored["steps"][1]["rollouts"] == [(1.0, "\nb\nc\n#### b")] * 2 + [(0.0, "\nx\nc\n#### x")] * 2
    assert [step["right"] for step in stored_wrong["steps"]] == [2, 2, 0]

    s.gae_lambda = s.baseline_smoothing = 0.5
    averaged, _ = run_iteration(engine, grader, s, problem)
    steps = solution(averaged[1], engine.decode)["steps"]
    made_of = [(step["target"], step["baseline"]) for step in steps]
    assert made_of == [(0.75, 0.5), (1.0, 0.5), (1.0, 0.75)]
    assert [step["advantage"] for step in steps] == [0.25, 0.5, 0.25]
    s.gae_lambda = s.baseline_smoothing = 0.0

    s.max_tokens = 12  # one too few: nothing ends, so nothing is right
    cut, _ = run_iteration(engine, grader, s, problem)
    assert not any(e.reward or e.finished for e in cut)
    assert all(v == 0.0 for e in cut for v in values(e))
    s.max_tokens, s.max_valued_steps, engine.requests = 14, 1, []
    capped, states = run_iteration(engine, grader, s, problem)
    assert len(states) == 1 and len(engine.requests) == 3
    assert [values(e) for e in capped] == [[0.5]] * 2
    assert [e.advantages[0] for e in capped] == [-0.5, 0.5] and not any(
        a for e in capped for a in e.advantages[1:]
    )
    grader.close()


def test_rollouts_begin_while_other_responses_are_written(device):
    """The second response ends first.

    Its states are submitted, and valued, before the first one has ended.
    """
    engine, grader, order = ScriptedEngine(lambda text, k: f"a\nb\n#### {k}"), Grader(), []
    s = train.Settings(**SETTINGS)
    vine = DealtVine(engine, grader, s)
    episodes = episodes_for([Problem("?", "0", prompt_ids=[ord("?")])], 2)

    def on_response(episode):
        order.append((episodes.index(episode), sum(len(state.rollouts) for state in vine.known.values())))
        vine.start(episode)

    sample(engine, grader, episodes, s, on_response)
    assert order == [(1, 0), (0, 2 * 4)]
    vine.finish(no_phase)
    grader.close()


def value_unequal_problems(rank):
    """Rank 0's response has eight lines, rank 1's one; the engines have room for one request.

    Behind t lines every (1 + t)th rollout is right.
    """

    def script(text, k):
        lines = text.count("line")
        return "line\n" * ((8 if text[0] == "0" else 1) - lines) + f"#### {int(k % (1 + lines) == 0)}"

    s = train.Settings(**SETTINGS | dict(responses_per_prompt=1, K=72, step_credit="newline", max_tokens=100))
    engine, grader = ScriptedEngine(script, rank, room=1), Grader()
    vine = DealtVine(engine, grader, s)
    episodes = episodes_for([Problem("", "1", prompt_ids=[ord(str(rank))])], 1)
    sample(engine, grader, episodes, s, on_response=vine.start)
    vine.finish(no_phase)
    vine.set_advantages(episodes)
    grader.close()
    (e,) = episodes
    assert all(len(state.rollouts) == 72 for state in e.states)
    return values(e), [chr(record.prompt_ids[0]) for record, *_ in engine.requests[1:]]


UNEQUAL = """
import json, sys
sys.path.insert(0, "tests")
import torch.distributed as dist
import test_iteration
from support.ranks import init_distributed, exit_all, gather_lists
init_distributed()
rank = dist.get_rank()
found = gather_lists([test_iteration.value_unequal_problems(rank)])
if rank == 0:
    print(json.dumps(found))
exit_all()
"""


def test_states_that_wait_are_dealt_to_the_rank_with_less_to_do(tmp_path):
    (tmp_path / "unequal.py").write_text(UNEQUAL)
    done = torchrun(2, tmp_path / "unequal.py")
    assert done.returncode == 0, done.stderr
    (values, prompts), (of_other, prompts_of_other) = json.loads(done.stdout.splitlines()[-1])
    assert len(values) >= 8
    for found in (values, of_other):
        assert found == [math.ceil(72 / (1 + t)) / 72 for t in range(len(found))]
    own, dealt = prompts.count("0"), prompts_of_other.count("0")
    assert set(prompts) == {"0"} and own + dealt == len(values) and min(own, dealt) >= 3, (
        prompts,
        prompts_of_other,
    )


costs = st.lists(st.integers(1, 50), max_size=20)


@given(st.lists(st.tuples(st.integers(0, 100), costs), min_size=1, max_size=8))
def test_queues_are_evened_out_as_far_as_their_items_allow(engines):
    begun, queues = zip(*engines)
    items = [[(owner, i) for i in range(len(queue))] for owner, queue in enumerate(queues)]
    dealt = even_out(begun, queues)
    assert sorted(sum(dealt, [])) == sorted(sum(items, []))
    cost = {(owner, i): size for owner, queue in enumerate(queues) for i, size in enumerate(queue)}
    before, after = ([load + sum(cost[x] for x in q) for load, q in zip(begun, qs)] for qs in (items, dealt))
    mean = sum(before) / len(before)
    for i in range(len(items)):
        if before[i] < mean:  # it keeps its own, and gets no more than it needs
            assert dealt[i][: len(items[i])] == items[i]
            assert after[i] < mean + 50 or dealt[i] == items[i]
        else:  # it keeps no more than it must
            assert dealt[i] == items[i][: len(dealt[i])] and mean <= after[i] <= before[i]
            assert not dealt[i] or after[i] - cost[dealt[i][-1]] < mean


def test_an_iteration_in_which_the_engine_gave_everything_up_goes_through(device):
    class Broken(ScriptedEngine):
        def complete(self, prompt, prefix, limit, k):
            return Completion([], "", False, None)

    engine, grader = Broken(None), Grader()
    episodes, states = run_iteration(
        engine, grader, train.Settings(**SETTINGS), Problem("?", "b", prompt_ids=[ord("?")])
    )
    assert states == []
    counts = dict(aborted=2, looked_up=0, found=0)
    metrics = iteration_metrics(episodes, states, dict(sample=1.0, values=1.0), counts, epochs=2)
    assert metrics["aborted"] == 2 and metrics["unfinished"] == 1
    assert metrics["reward"] == metrics["states"] == metrics["value_mean"] == 0
    assert all(math.isfinite(value) for value in metrics.values()) and metrics["idle"] == 0
    grader.close()


def test_engine_and_trainer_that_disagree_are_reported_once(tmp_path):
    run, said = Run(train.Settings(run_dir=str(tmp_path))), []
    run.say = said.append
    fine, wide, nan = (
        {"logprob_gap": gap, "skipped_steps": 0, "aborted": 0, "reward": 0.5}
        for gap in (1e-6, 0.004, float("nan"))
    )
    run.trainer = SimpleNamespace(dtype=torch.bfloat16)
    run._warn(wide)  # rounding
    run.trainer.dtype = torch.float32
    run._warn(fine)
    assert said == []
    run._warn(wide)
    assert "ENGINE AND TRAINER DISAGREE" in said[0] and "new weights did not reach the engine" in said.pop()
    run._warn(nan)
    assert said == []
    run._warn(fine | {"skipped_steps": 3})
    assert said == ["3 skipped steps: a loss or gradient was not finite, or the mean ratio was too large"]


@pytest.mark.parametrize(
    "unfinished, graded, cached, words",
    [
        (1, 0, 0, ["NO RESPONSE ENDED", "--stop", "--max_tokens"]),
        (0.5, 0, 0, ["NO RESPONSE HAS AN ANSWER", "boxed", "--prompt_template", "--stop"]),
        (0, 0, 3, ["NO RESPONSE HAS A REWARD", "gold answers"]),
        (0, None, None, ["NO RESPONSE HAS A REWARD"]),  # another reward, which counts no answers
    ],
)
def test_an_iteration_without_any_reward_is_reported_once_with_its_likely_causes(
    unfinished, graded, cached, words, tmp_path
):
    run, said = Run(train.Settings(run_dir=str(tmp_path))), []
    run.say, run.trainer = said.append, SimpleNamespace(dtype=torch.float32)
    counts = {} if graded is None else {"answers_graded": graded, "answers_cached": cached}
    metrics = {"logprob_gap": 0.0, "aborted": 0, "unfinished": unfinished} | counts
    run._warn(metrics | {"reward": 0.1})
    assert said == []
    run._warn(metrics | {"reward": 0.0})
    assert all(word in said[0] for word in words)
    run._warn(metrics | {"reward": 0.0})
    assert len(said) == 1
