"""The baselines' formulas against their definitions, the critic's and DPO+'s training against plain
torch, and small runs that improve.
"""

import json
import random
import statistics
import sys
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from conftest import EXACT, GAP, python, settings, torchrun
from transformers import AutoModelForCausalLM, AutoModelForTokenClassification

import data
import train
from baselines import critic, dpo, groups, restem
from episode import Episode
from grader import Grader
from learner import micro_batch
from model import full_tensors, load_sharded
from ppo import Trainer, whiten
from rollout import episodes_for, sample
from support.ranks import exit_all, init_distributed
from vine import Vine

# --- GRPO, RLOO ---


def test_group_advantages():
    assert groups.rloo([1.0, 0.0, 0.0, 1.0]) == pytest.approx(
        [2 / 3, -2 / 3, -2 / 3, 2 / 3]
    )  # R - the mean of the other three
    std = statistics.stdev([1.0, 0.0, 0.0])
    assert groups.grpo([1.0, 0.0, 0.0]) == pytest.approx([2 / 3 / std, -1 / 3 / std, -1 / 3 / std])
    assert groups.grpo([1.0, 1.0]) == [0.0, 0.0] and groups.rloo([0.0, 0.0]) == [0.0, 0.0]
    episodes = [
        Episode([1], response_ids=[5] * n, reward=r) for r, n in [(1.0, 2), (0.0, 3), (1.0, 1), (1.0, 4)]
    ]
    groups.Group(groups.rloo, 2).set_advantages(episodes)
    assert [e.advantages for e in episodes] == [[1.0] * 2, [-1.0] * 3, [0.0], [0.0] * 4]


@pytest.mark.parametrize("reward", [0.9, 0.3, 1.2])
def test_equal_rewards_that_are_no_whole_numbers_give_no_advantage(reward):
    """Rounding must not be scaled up: a standard deviation of 1e-8 is none."""
    rewards = [reward] * 8
    assert groups.grpo(rewards) == [0.0] * 8 and groups.rloo(rewards) == pytest.approx([0.0] * 8, abs=1e-15)
    assert whiten(torch.tensor(rewards)).abs().max() < 1e-6
    assert whiten(torch.tensor(groups.rloo(rewards))).abs().max() < 1e-6


def test_rloo_is_the_unbiased_policy_gradient():
    """A two-armed bandit, group of 3: the mean of A * grad log pi over all outcomes is the gradient
    of the expected reward.
    """
    logit = torch.tensor(0.3, requires_grad=True)
    p = torch.sigmoid(logit)
    (exact,) = torch.autograd.grad(p * 1.0, logit)
    total = 0.0
    for outcome in range(8):
        actions = [float(outcome >> k & 1) for k in range(3)]  # reward 1 for action 1
        probability = torch.stack([p if a else 1 - p for a in actions]).prod().item()
        for action, advantage in zip(actions, groups.rloo(actions)):
            score = (1 - p).item() if action else -p.item()  # d log pi(action) / d logit
            total += probability * advantage * score / 3
    assert total == pytest.approx(exact.item(), rel=1e-5)


# --- PPO ---


def test_gae_is_the_weighted_sum_of_the_errors_that_follow():
    rng = random.Random(0)
    for lam in (1.0, 0.8, 0.0):
        values, reward = [rng.random() for _ in range(6)], 1.0
        rewards, following = [0.0] * 5 + [reward], [*values[1:], 0.0]
        deltas = [r + after - v for r, after, v in zip(rewards, following, values)]
        expected = [sum(lam ** (k - t) * deltas[k] for k in range(t, 6)) for t in range(6)]
        assert critic.gae(values, reward, lam) == pytest.approx(expected)
    assert critic.gae(values, reward) == pytest.approx([reward - v for v in values])  # the paper's lambda = 1
    assert critic.gae([], 1.0) == []


def test_value_loss_is_the_larger_of_the_clipped_and_the_plain_square():
    values, old, returns = (
        torch.tensor([0.9, 0.1, 0.5]),
        torch.tensor([0.5, 0.5, 0.5]),
        torch.tensor([1.0, 1.0, 0.0]),
    )
    # 0.9 is clipped to 0.7: max(0.01, 0.09); 0.1 to 0.3: max(0.81, 0.49); 0.5 stays: 0.25
    for num_tokens in (3, 6):
        loss = critic.value_loss(values, old, returns, num_tokens, clip=0.2)
        assert loss.item() == pytest.approx(0.5 * (0.09 + 0.81 + 0.25) / num_tokens)


def episodes_for_the_critic(seed=0):
    rng = random.Random(seed)
    return [
        Episode(
            prompt_ids=[1, *rng.choices(range(3, 20), k=rng.randint(2, 6))],
            response_ids=rng.choices(range(2, 20), k=n),
            reward=float(n % 2),
        )
        for n in (3, 9, 5, 4)
    ]


@pytest.mark.parametrize("micro_batch_tokens", [1, 1000])
def test_a_critic_step_is_plain_torch(tiny_model, device, micro_batch_tokens):
    episodes = episodes_for_the_critic()
    s = settings(tiny_model, iterations=10**6, epochs=1, minibatch=4, prompts_per_iteration=2)
    s.critic_learning_rate, s.micro_batch_tokens = 1e-2, micro_batch_tokens
    network = critic.Critic(s, device)
    network.set_advantages(episodes)
    for e in episodes:
        assert e.token_values == [0.0] * len(e.response_ids)  # the head starts at zero
        assert e.advantages == e.returns == [e.reward] * len(e.response_ids)

    torch.manual_seed(0)
    plain = AutoModelForTokenClassification.from_pretrained(tiny_model, num_labels=1).eval()
    with torch.no_grad():
        for (
            name,
            parameter,
        ) in network.model.named_parameters():  # away from zero, so that the backbone learns too
            if name.startswith("network.score"):
                parameter.fill_(0.01)
        plain.score.weight.fill_(0.01)
        plain.score.bias.fill_(0.01)
    network.set_advantages(episodes)
    optimizer = torch.optim.AdamW(plain.parameters(), lr=1e-2 / round(0.03 * 10**6), weight_decay=0.0)
    loss, tokens, start = 0.0, 0, {name: t.clone() for name, t in plain.state_dict().items()}
    for e in episodes:
        values = plain(torch.tensor([e.prompt_ids + e.response_ids])).logits[0, len(e.prompt_ids) - 1 : -1, 0]
        assert values.tolist() == pytest.approx(e.token_values, abs=1e-5)  # the value before each token
        loss, tokens = (
            loss + 0.5 * ((values - e.reward) ** 2).sum(),
            tokens + len(values),
        )  # lambda = 1: the return is R
    (loss / tokens).backward()
    torch.nn.utils.clip_grad_norm_(plain.parameters(), 1.0)
    optimizer.step()
    metrics = network.update(episodes)
    assert metrics["value_loss"] == pytest.approx((loss / tokens).item(), rel=1e-4)
    for name, tensor in full_tensors(network.model):
        expected = plain.state_dict()[name]
        assert (tensor.cpu() - expected).norm() <= 2e-3 * (expected - start[name]).norm() + 1e-9, name


def test_a_critic_learns_what_can_be_told_from_the_prompt_and_is_restored(tiny_model, device, tmp_path):
    """Responses to prompts with token 5 are right, those with token 6 wrong: the explained variance
    goes from 0 to near 1.
    """
    rng = random.Random(0)
    s = settings(tiny_model, iterations=15, prompts_per_iteration=16, minibatch=16, learning_rate=1e-3)
    network = critic.Critic(s, device)
    explained = []
    for _ in range(15):
        episodes = [
            Episode(
                prompt_ids=[1, 5 + i % 2, 9],
                response_ids=rng.choices(range(3, 20), k=rng.randint(2, 8)),
                reward=float(i % 2 == 0),
            )
            for i in range(32)
        ]
        network.set_advantages(episodes)
        explained.append(network.update(episodes)["explained_variance"])
    assert explained[0] < 0.05 and explained[-1] > 0.8, explained
    network.save(tmp_path)
    again = critic.Critic(s, device)
    again.load(tmp_path)
    assert again.learner.step == network.learner.step == 60
    other = [replace(e) for e in episodes]
    network.set_advantages(episodes)
    again.set_advantages(other)
    assert [e.token_values for e in episodes] == [e.token_values for e in other]


# --- RestEM, DPO+ ---


def graded(prompt, text, reward):
    return Episode([1, prompt], response_ids=[*map(ord, text)], text=text, reward=reward)


EPISODES = [
    *(graded(3, t, 1.0) for t in ("a", "b", "a", "c")),
    *(graded(3, t, 0.0) for t in ("x", "y")),
    *(graded(4, t, 1.0) for t in ("d",)),
    *(graded(5, t, 0.0) for t in ("z", "z")),
]


def test_restem_keeps_distinct_right_responses_up_to_the_cap():
    kept = restem.right_responses(EPISODES, cap=2, seed=0)
    assert len(kept) == 3 and len({(*e.prompt_ids, e.text) for e in kept}) == 3
    assert sorted(e.text for e in restem.right_responses(EPISODES, cap=9, seed=0)) == ["a", "b", "c", "d"]


def test_dpo_pairs_are_of_one_problem_and_no_response_is_in_two():
    pairs = dpo.pairs_of(EPISODES, cap=4, seed=0)
    assert len(pairs) == 2 and sorted(wrong.text for _, wrong in pairs) == ["x", "y"]
    assert len({right.text for right, _ in pairs}) == 2 and all(
        r.prompt_ids == w.prompt_ids for r, w in pairs
    )
    assert len(dpo.pairs_of(EPISODES, cap=1, seed=0)) == 1


def test_dpo_positive_against_its_definition_and_autograd():
    right, wrong = (
        torch.tensor([-3.0, -2.0], requires_grad=True),
        torch.tensor([-2.5, -4.0], requires_grad=True),
    )
    ref_right, ref_wrong, beta, penalty = torch.tensor([-2.0, -2.5]), torch.tensor([-2.0, -2.0]), 0.3, 5.0
    loss = dpo.dpo_positive_loss(right, wrong, ref_right, ref_wrong, beta, penalty)
    # first pair: log-ratios -1 and -0.5, the right one has lost 1; second: 0.5 and -2, it has lost nothing
    margins = [beta * (-1.0 + 0.5 - penalty * 1.0), beta * (0.5 + 2.0)]
    assert loss.tolist() == pytest.approx([torch.tensor(-m).exp().log1p().item() for m in margins])
    loss.sum().backward()
    weights = [
        1 - torch.sigmoid(torch.tensor(m)).item() for m in margins
    ]  # d loss / d margin = -(1 - sigmoid(margin))
    assert right.grad.tolist() == pytest.approx([-weights[0] * beta * (1 + penalty), -weights[1] * beta])
    assert wrong.grad.tolist() == pytest.approx([weights[0] * beta, weights[1] * beta])


def test_a_dpo_round_widens_the_margin_and_matches_plain_log_probabilities(tiny_model, device):
    episodes = [graded(p, chr(7 + k) * (2 + k), float(k % 2)) for p in range(3, 11) for k in range(4)]
    s = dpo.Settings(
        model=tiny_model,
        learning_rate=1e-3,
        batch=4,
        micro_batch=3,
        epochs=3.0,
        cap=2,
    )
    pairs = dpo.pairs_of(episodes, s.cap, s.seed)
    plain = AutoModelForCausalLM.from_pretrained(tiny_model).eval()

    def margin(logprobs):
        return sum(logprobs(r) - logprobs(w) for r, w in pairs)

    def by_plain_torch(e):
        ids = torch.tensor([e.prompt_ids + e.response_ids])
        logprobs = plain(ids).logits[0, :-1].log_softmax(-1).gather(-1, ids[0, 1:, None])[:, 0]
        return logprobs[len(e.prompt_ids) - 1 :].sum().item()

    model = load_sharded(tiny_model, device, **EXACT)
    with torch.no_grad():
        before = margin(lambda e: dpo.response_logprobs(model, micro_batch([e], [0], device), [e]).item())
        assert before == pytest.approx(margin(by_plain_torch), abs=1e-3)
    model, steps, metrics = dpo.train_round(s, episodes, None, device)
    assert steps == 12 and metrics["examples"] == 16
    with torch.no_grad():
        assert (
            margin(lambda e: dpo.response_logprobs(model, micro_batch([e], [0], device), [e]).item())
            > before + 1
        )


def trained(model, device, rank=0, world=1):
    """The weights after an update of the critic, a round of DPO+ and a round of RestEM, by this
    rank's share of the work: [{name: tensor}].
    """
    share = episodes_for_the_critic()[rank::world]
    options = dict(learning_rate=1e-2, minibatch=4, prompts_per_iteration=2, micro_batch_tokens=1)
    network = critic.Critic(settings(model, **options), device)
    with torch.no_grad():
        network.model.network.score.weight.add_(0.01)
    for _ in range(2):
        network.set_advantages(share)
        network.update(share)
    policies = [network.model]
    episodes = [graded(p, chr(7 + k) * (2 + k), float(k % 2)) for p in range(3, 11) for k in range(4)]
    for module in (dpo, restem):
        s = module.Settings(
            model=model,
            learning_rate=1e-2,
            batch=4,
            micro_batch=1,
            epochs=1.0,
            cap=2,
        )
        policies.append(module.train_round(s, episodes, None, device)[0])
    return [{name: x.to("cpu", copy=True) for name, x in full_tensors(policy)} for policy in policies]


def test_two_ranks_train_the_baselines_as_one_does(tiny_model, device, tmp_path):
    done = torchrun(2, __file__, tiny_model, tmp_path / "two.pt")
    assert done.returncode == 0, done.stderr
    start = AutoModelForCausalLM.from_pretrained(tiny_model).state_dict()
    error = 1e-2 if device.type == "cpu" else 0.1  # of the change; the rounds compute in bf16 on a GPU
    for got, expected in zip(torch.load(tmp_path / "two.pt"), trained(tiny_model, device), strict=True):
        for name, tensor in expected.items():
            change = (tensor - start.get(name, 0.0)).norm()
            assert change > 1e-3 and (got[name] - tensor).norm() < error * change, name


def test_values_are_whitened_and_group_advantages_are_not_unless_asked_for():
    by_default = {name: train.parse_settings(["--algorithm", name]).whiten for name in train.ALGORITHMS}
    assert by_default == dict(vineppo=True, ppo=True, grpo=False, rloo=False)
    assert train.parse_settings(["--algorithm", "rloo", "--whiten", "True"]).whiten
    assert not train.parse_settings(["--whiten", "False"]).whiten


# --- whole loops on a problem that is learnt in seconds: a response is right if it begins with 7 ---


class BeginsWith7(Grader):
    def __init__(self):
        pass

    def begin(self, record):
        pass

    def grade(self, texts, golds):
        return [text.startswith("7") for text in texts]


@pytest.mark.parametrize("algorithm", ["vineppo", "ppo", "grpo", "rloo", "restem", "dpo"])
def test_the_share_of_right_responses_rises(algorithm, engine, tiny_model, tokenizer, device):
    """From 1 in 22 at random, through the real engine, trainer and critic; what every algorithm
    gets are the graded responses alone.
    """
    engine.load_weights(full_tensors(load_sharded(tiny_model, device)))
    s = settings(tiny_model, responses_per_prompt=32, minibatch=64, iterations=50, learning_rate=1e-3)
    s.K, s.step_credit, s.max_tokens, s.top_p = 4, "tokens:1", 4, 1.0
    s.whiten = algorithm in ("vineppo", "ppo")
    batch = [data.Problem("", "", prompt_ids=tokenizer(f"{i}+{i}?\n")["input_ids"]) for i in range(4)]
    rewards, policy = [], None
    if algorithm in ("restem", "dpo"):
        module = {"restem": restem, "dpo": dpo}[algorithm]
        r = module.Settings(
            model=tiny_model,
            learning_rate=1e-3,
            batch=8,
            micro_batch=8,
            cap=64,
            epochs=4.0,
        )
    else:
        estimator = {
            "vineppo": lambda: Vine(engine, BeginsWith7(), s),
            "ppo": lambda: critic.Critic(s, device),
            "grpo": lambda: groups.Group(groups.grpo, s.responses_per_prompt),
            "rloo": lambda: groups.Group(groups.rloo, s.responses_per_prompt),
        }[algorithm]()
        trainer = Trainer(s, device)
    for _ in range(12):
        episodes = episodes_for(batch, s.responses_per_prompt)
        if algorithm in ("restem", "dpo"):
            sample(engine, BeginsWith7(), episodes, s)
            policy, _, _ = module.train_round(r, episodes, policy, device)
        else:
            sample(engine, BeginsWith7(), episodes, s, on_response=estimator.start)
            estimator.finish(lambda name, can_stop=False: nullcontext())
            estimator.set_advantages(episodes)
            trainer.update(episodes)
            estimator.update(episodes)
        rewards.append(statistics.mean(e.reward for e in episodes))
        engine.load_weights(full_tensors(policy or trainer.policy))
    assert rewards[0] < 0.15 and max(rewards[-2:]) > 0.3, rewards


# --- runs ---


def metrics_of(run):
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


SMALL = ["--max_tokens", 16, "--eval_problems", 8, "--eval_samples", 1]


def test_two_ranks_that_share_an_engine(tmp_path, tiny_model):
    arguments = [
        "--prompts_per_iteration",
        4,
        "--responses_per_prompt",
        2,
        "--minibatch",
        4,
        "--K",
        2,
        "--max_sequences",
        4,
        "--iterations",
        2,
    ]
    arguments += [*SMALL, "--model", tiny_model, "--tensor_parallel_size", 2]
    left = Path("/dev/shm/-tp:0-[0-1]-cpushm_0")  # as by a run that was killed
    left.touch()
    done = torchrun(2, "train.py", *arguments, "--run_dir", tmp_path / "run")
    assert done.returncode == 0, done.stderr
    assert not left.exists()
    first, *lines = metrics_of(tmp_path / "run")
    assert [line["gradient_steps"] for line in lines] == [4, 8] and all(
        line["logprob_gap"] < GAP for line in lines
    )
    # nothing is right, so every advantage is 0 and only the KL penalty is left, which is 0 at the start
    assert all(line["reward"] == 0 and line["zero_advantages"] == 1 for line in lines)
    assert all(
        line["rollouts"] == 2 * line["states"] > 0 and line["tokens_values"] > 0 for line in lines
    )  # each counted once
    assert lines[0]["policy_loss"] == 0


def test_rounds_on_two_ranks_go_through_where_nothing_is_right(tmp_path, tiny_model):
    arguments = [
        *SMALL,
        "--rounds",
        1,
        "--problems_per_round",
        5,
        "--responses_per_prompt",
        2,
        "--model",
        tiny_model,
    ]
    done = torchrun(2, "-m", "baselines.dpo", *arguments, "--run_dir", tmp_path / "run")
    assert done.returncode == 0, done.stderr
    first, line = metrics_of(tmp_path / "run")
    assert (
        first == {"iteration": 0, "accuracy": 0.0} and line["examples"] == 0 and line["gradient_steps"] == 0
    )
    assert 5 * 2 <= line["tokens_sample"] <= 5 * 2 * 16
    for name, tensor in AutoModelForCausalLM.from_pretrained(tmp_path / "run" / "model").state_dict().items():
        assert torch.equal(tensor, AutoModelForCausalLM.from_pretrained(tiny_model).state_dict()[name])
    again = python("-m", "baselines.dpo", *arguments, "--run_dir", tmp_path / "run")
    assert (
        again.returncode == 1
        and "holds a run already" in again.stderr
        and len(again.stderr.strip().splitlines()) == 1
    )


def test_bad_input_is_said_by_rank_0_before_torchrun_ends_it(tmp_path):
    done = torchrun(2, "-m", "baselines.dpo", "--batch", 3, "--run_dir", tmp_path)
    assert (
        done.returncode != 0
        and "dpo: --batch 3 does not divide over 2 ranks: take a multiple of 2" in done.stderr
    )


if __name__ == "__main__":  # one rank of test_two_ranks_train_the_baselines_as_one_does
    joined = init_distributed()
    weights = trained(sys.argv[1], joined, torch.distributed.get_rank(), torch.distributed.get_world_size())
    if torch.distributed.get_rank() == 0:
        torch.save(weights, sys.argv[2])
    exit_all()
