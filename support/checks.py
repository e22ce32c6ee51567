"""Which settings of train.py go together, and whether engine and trainer compute alike."""

import torch

from support.settings import require

# most that the engine's and the trainer's log-probabilities may differ on average
GAP = {torch.float32: 0.001, torch.bfloat16: 0.05}
VINEPPO = ["K", "step_credit", "max_valued_steps", "baseline_smoothing"]
BELONGS_TO = dict.fromkeys(VINEPPO, ["vineppo"]) | {"critic_learning_rate": ["ppo"]}
BELONGS_TO["gae_lambda"] = ["vineppo", "ppo"]


def check_given(s, given):
    """given: names of the settings on the command line, which must have an effect."""
    trains = " --".join(sorted(given & {"iterations", "eval_every", "save_every"}))
    require(not (s.eval_only and trains), f"--eval_only trains nothing: leave out --{trains}")
    for name in sorted(given & set(BELONGS_TO)):
        why = f"does nothing with --algorithm {s.algorithm}: it belongs to {' and '.join(BELONGS_TO[name])}"
        require(s.algorithm in BELONGS_TO[name], f"--{name} {why}")


def check_temperatures(s):
    """Raise ValueError below vLLM's floor: it would sample at 0.01 there."""
    for name in ("temperature", "eval_temperature"):
        value, zero = getattr(s, name), name == "eval_temperature"  # 0: greedy
        lowest = "0 or at least 0.01" if zero else "at least 0.01"
        require(value >= 0.01 or zero and value == 0, f"--{name} {value} must be {lowest}")


def check(s, world):
    """Raise ValueError for settings that do not go together, or not on `world` ranks."""
    if not s.eval_only:
        check_batches(s, world)
    size = s.tensor_parallel_size
    require(world % size == 0, f"--tensor_parallel_size {size} is no divisor of the {world} ranks")
    check_temperatures(s)
    greedy = "--eval_temperature 0 gives one and the same response: add --eval_samples 1"
    require(s.eval_temperature > 0 or s.eval_samples == 1, greedy)
    room = f"--max_tokens {s.max_tokens} leaves no room for prompts in --max_sequence {s.max_sequence}"
    require(s.max_tokens < s.max_sequence, room)


def check_batches(s, world):
    """Raise ValueError where an iteration's responses do not divide over its minibatches and `world` ranks."""
    divide = f"does not divide over {world} ranks: take a multiple of {world}"
    prompts = s.prompts_per_iteration
    require(prompts % world == 0, f"--prompts_per_iteration {prompts} {divide}")
    require(s.minibatch % world == 0, f"--minibatch {s.minibatch} {divide}")
    responses = prompts * s.responses_per_prompt
    what = f"the iteration's {responses} responses (prompts_per_iteration x responses_per_prompt)"
    require(responses % s.minibatch == 0, f"--minibatch {s.minibatch} does not divide {what}")
    few = f"--algorithm {s.algorithm}: --responses_per_prompt 1 must be at least 2, to compare them"
    require(s.responses_per_prompt > 1 or s.algorithm not in ("grpo", "rloo"), few)


def disagreement(gap, dtype):
    """What to say of a logprob_gap in this type: "" if it is small."""
    limit = GAP[dtype]
    if gap <= limit:  # false for NaN
        return ""
    return (
        "ENGINE AND TRAINER DISAGREE: their log-probabilities of the sampled tokens differ by "
        f"{gap:.2g} on average, more than {limit:g}. Likely causes: the new weights did not "
        "reach the engine; cached prefixes of older weights; an architecture that vLLM and transformers "
        "compute differently (attention window, rope scaling, mixture of experts); low-precision kernels."
    )
