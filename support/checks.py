"""Which settings of train.py go together, and whether engine and trainer compute alike."""

import torch

from support.settings import require

# most that the engine's and the trainer's log-probabilities may differ on average
GAP = {torch.float32: 0.001, torch.bfloat16: 0.05}
BELONGS_TO = {  # settings that are not of every algorithm
    "K": "vineppo",
    "step_credit": "vineppo",
    "max_valued_steps": "vineppo",
    "baseline_smoothing": "vineppo",
    "critic_learning_rate": "ppo",
    "gae_lambda": "vineppo or ppo",
}


def check_given(s, given):
    """given: names of the settings on the command line, which must have an effect."""
    for name in sorted(given & {"iterations", "eval_every", "save_every"}):
        require(not s.eval_only, f"--eval_only trains nothing: leave out --{name}")
    for name in sorted(given & set(BELONGS_TO)):
        require(
            s.algorithm in BELONGS_TO[name].split(),
            f"--{name} does nothing with --algorithm {s.algorithm}: it belongs to {BELONGS_TO[name]}",
        )


def check_temperatures(s):
    """Raise ValueError below vLLM's floor: it would sample at 0.01 there."""
    require(s.temperature >= 0.01, f"--temperature {s.temperature} must be at least 0.01")
    require(
        s.eval_temperature == 0 or s.eval_temperature >= 0.01,
        f"--eval_temperature {s.eval_temperature} must be 0 or at least 0.01",
    )


def check(s, world):
    """Raise ValueError for settings that do not go together, or not on `world` ranks."""
    if not s.eval_only:
        check_batches(s, world)
    check_temperatures(s)
    require(
        world % s.tensor_parallel_size == 0,
        f"--tensor_parallel_size {s.tensor_parallel_size} is no divisor of the {world} ranks",
    )
    require(
        s.eval_temperature > 0 or s.eval_samples == 1,
        "--eval_temperature 0 gives one and the same response: add --eval_samples 1",
    )
    require(
        s.max_tokens < s.max_sequence,
        f"--max_tokens {s.max_tokens} leaves no room for prompts in --max_sequence {s.max_sequence}",
    )


def check_batches(s, world):
    """Raise ValueError where an iteration's responses do not divide over its minibatches and `world` ranks."""
    for name in ("prompts_per_iteration", "minibatch"):
        size = getattr(s, name)
        require(
            size % world == 0,
            f"--{name} {size} does not divide over {world} ranks: take a multiple of {world}",
        )
    responses = s.prompts_per_iteration * s.responses_per_prompt
    require(
        responses % s.minibatch == 0,
        f"--minibatch {s.minibatch} does not divide the iteration's {responses} responses "
        "(prompts_per_iteration x responses_per_prompt)",
    )
    require(
        s.responses_per_prompt > 1 or s.algorithm not in ("grpo", "rloo"),
        f"--algorithm {s.algorithm} compares responses: --responses_per_prompt 1 must be at least 2",
    )


def without_reward(metrics):
    """What to report of an iteration whose responses have no reward: "" if one has."""
    if metrics["reward"]:
        return ""
    if metrics["unfinished"] == 1:
        return (
            "NO RESPONSE ENDED: all reached --max_tokens. Likely causes: the model does not generate --stop or EOS "
            "after such prompts (does it need --chat?); --max_tokens is too small."
        )
    if not metrics.get("answers_graded", 1) + metrics.get("answers_cached", 0):
        return (
            "NO RESPONSE HAS AN ANSWER: read are \\boxed{..}, '#### ..', a last line 'Answer: ..' and 'The answer "
            "is ..'. Likely causes: the prompt does not ask for one of these (--prompt_template, --chat); --stop ends "
            "the responses before it."
        )
    return (
        "NO RESPONSE HAS A REWARD, although answers were read. Likely causes: the gold answers are of another form, or "
        "not in the column that was read (--answer_column); the problems are too hard for the model. The stored "
        "responses show both (episodes/)."
    )


def disagreement(gap, dtype):
    """What to report of a logprob_gap in this type: "" if it is small."""
    limit = GAP[dtype]
    if gap <= limit:  # false for NaN
        return ""
    return (
        "ENGINE AND TRAINER DISAGREE: their log-probabilities of the sampled tokens differ by "
        f"{gap:.2g} on average, more than {limit:g}. Likely causes: the new weights did not "
        "reach the engine; cached prefixes of older weights; an architecture that vLLM and transformers "
        "compute differently (attention window, rope scaling, mixture of experts); low-precision kernels."
    )
