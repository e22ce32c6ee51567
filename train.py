"""VinePPO (arXiv 2410.01679): PPO for LLM reasoning, with values measured by rollouts, not by a network.

    torchrun --nproc_per_node=2 train.py --dataset arithmetic --model runs/sft     # GPU or CPU; see `make demo`
    torchrun --nproc_per_node=8 train.py --dataset math        # the paper's Rho-1B run
    torchrun --nproc_per_node=8 train.py --dataset math --run_dir runs/math-7b \
        --model realtreetune/deepseekmath-7b-sft-MATH-v2 --max_sequence 2499       # DeepSeekMath-7B's
    torchrun --nproc_per_node=8 train.py --dataset math --run_dir runs/ppo --algorithm ppo  # or grpo, rloo
    python train.py --dataset gsm8k --model MODEL --eval_only                  # accuracy alone

simple.py is the algorithm in one file. Here, read `train` first: Algorithm 1 of the paper. Then episode.py (the
records), rollout.py (sampling), vine.py (values and advantages), ppo.py (the update), model.py (the sharded policy).
docs/differences.md lists what differs from the paper.
"""

import support.startup  # noqa: F401 (before torch is imported)

# isort: split
import os
import random
import sys
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from transformers.utils import logging

import data
from dealing import DealtVine
from grader import Grader
from ppo import Trainer
from steps import check_rule
from support.checks import check, check_given
from support.metrics import evaluation_metrics
from support.model_files import fingerprint
from support.pretrained import load_tokenizer
from support.ranks import check_gpus, exit_all, init_distributed, refuse, world_size
from support.run import Run
from support.settings import parse, setting
from support.supported import check_supported
from support.watch import Watch

logging.disable_progress_bar()  # transformers' own bars, one a file


ALGORITHMS = ["vineppo", "ppo", "grpo", "rloo"]


@dataclass
class Settings:
    """The values are the paper's for MATH with Rho-1B (released config rho1b). PRESETS replaces some."""

    # the run
    dataset: str = setting(
        "arithmetic",
        "math, gsm8k, arithmetic or worded (both built in), a path, or OWNER/NAME[:SPLIT] on the hub",
    )
    model: str | None = setting("realtreetune/rho-1b-sft-MATH", "Hugging Face folder or hub name")
    algorithm: str = setting("vineppo", "whose advantages", choices=ALGORITHMS)
    run_dir: str | None = setting(None, "folder of the run; None: runs/DATASET", may_change=True)
    iterations: int = setting(1000, "rounds of sampling and update", min=1)
    seed: int = setting(0, "of the problems, the sampling and the minibatches")
    # problems and prompts
    prompt_template: str | None = setting(
        None, "prompt with {problem} in it; None: the paper's", is_text=True
    )
    chat: bool = setting(False, "put the prompt into the tokenizer's chat template")
    problem_column: str | None = setting(None, "where the problem stands; None: see docs/data.md")
    answer_column: str | None = setting(None, "where its answer does; a.b for a column in a column")
    system: str | None = setting(None, "text of the system turn, in place of the data's", is_text=True)
    chat_options: str | None = setting(None, 'JSON for the chat template: {"enable_thinking": false}')
    # advantages
    K: int = setting(9, "vineppo: rollouts that estimate the value of each state", min=1)
    step_credit: str = setting("paper", "vineppo: paper, newline, sentence, tokens:N, cutpoints:N")
    baseline_smoothing: float = setting(
        0.0, "vineppo: weight of earlier states' values in the baseline", min=0, max=1
    )
    max_valued_steps: int | None = setting(None, "vineppo: value only a response's first N states", min=1)
    gae_lambda: float | None = setting(None, "lambda of GAE; None: vineppo 0, ppo 1", min=0, max=1)
    whiten: bool | None = setting(None, "whiten advantages; None: vineppo and ppo True, grpo and rloo False")
    critic_learning_rate: float | None = setting(None, "ppo: the critic's; None: --learning_rate", above=0)
    # sampling
    prompts_per_iteration: int = setting(64, "problems drawn, with replacement", min=1)
    responses_per_prompt: int = setting(8, "responses sampled for each of them", min=1)
    temperature: float = setting(0.6, "of sampling, and the trainer's logits", above=0)
    top_p: float = setting(0.9, "nucleus of responses, rollouts and evaluations", above=0, max=1)
    max_tokens: int = setting(1024, "token limit of a response, and of prefix and rollout together", min=1)
    max_sequence: int = setting(2048, "token limit of prompt and response together", min=1)
    stop: str | None = setting("\n\n\nProblem:", "string that ends a response, besides EOS", is_text=True)
    # the update
    learning_rate: float = setting(1e-6, "peak; 3 percent warm-up, then linear decay to 0", above=0)
    minibatch: int = setting(64, "responses per optimizer step, over all ranks", min=1)
    micro_batch_tokens: int = setting(
        8192, "tokens per forward pass of a rank: memory, speed", min=1, may_change=True
    )
    epochs: int = setting(2, "passes over an iteration's responses", min=1)
    kl_coef: float = setting(1e-4, "weight of the KL penalty to the initial policy", min=0)
    # evaluation and saving
    eval_only: bool = setting(False, "evaluate --model and exit", may_change=True)
    eval_every: int = setting(25, "iterations between evaluations, or 0", min=0, may_change=True)
    eval_problems: int | None = setting(
        None, "evaluate on the first N test problems; None: all", min=1, may_change=True
    )
    eval_samples: int = setting(
        16, "responses per test problem; accuracy is their mean", min=1, may_change=True
    )
    eval_temperature: float = setting(0.35, "temperature of evaluations", min=0, may_change=True)
    save_every: int = setting(50, "iterations between checkpoints; 0: none", min=0, may_change=True)
    store_every: int = setting(
        50, "iterations between stored responses (show.py); 0: never", min=0, may_change=True
    )
    # the machine
    bfloat16: bool | None = setting(None, "compute in bfloat16; None: on GPUs only")
    tensor_parallel_size: int = setting(1, "ranks that share an engine", min=1, may_change=True)
    gpu_memory: float = setting(
        0.6, "share of a GPU for the engine while it samples", above=0, max=1, may_change=True
    )
    max_sequences: int | None = setting(None, "sequences an engine writes at once", min=1, may_change=True)
    hang_timeout: float = setting(90.0, "seconds without progress of a rank", above=0, may_change=True)
    trust_remote_code: bool = setting(False, "let a hub model run code of its own", may_change=True)


TINY = dict(  # of the built-in tasks' tiny models, whose cache has many blocks even with little gpu_memory
    iterations=80, prompts_per_iteration=32, responses_per_prompt=2, K=4, temperature=1.0, top_p=1.0, stop=None,
    learning_rate=1e-4, minibatch=32, micro_batch_tokens=4096, eval_every=20, eval_samples=2, gpu_memory=0.1,
    eval_temperature=1.0, save_every=40, store_every=20,
)  # fmt: skip
PRESETS = {  # what differs from the values above; any other dataset has those, and no model
    "math": {},
    "gsm8k": dict(model="realtreetune/rho-1b-sft-GSM8K", iterations=650, max_valued_steps=25),
    "arithmetic": TINY | dict(model="runs/sft", max_tokens=128, max_sequence=160),
    "worded": TINY | dict(model="runs/sft-worded", max_tokens=256, max_sequence=320),
}


def parse_settings(argv):
    """The settings of a command line; raises ValueError for one out of range or without effect."""
    s, given = parse(Settings, argv, __doc__, PRESETS, other=dict(model=None))
    check_given(s, given)
    check_rule(s.step_credit)
    s.run_dir = s.run_dir or f"runs/{Path(s.dataset).resolve().stem or 'data'}"
    if s.whiten is None:
        s.whiten = s.algorithm in ("vineppo", "ppo")
    return s


def make_estimator(s, engine, grader, device):
    """Where the advantages come from. A new algorithm: an Estimator, and its lines here."""
    if s.algorithm == "vineppo":
        return DealtVine(engine, grader, s)
    from baselines import critic, groups  # the one import that points outwards

    if s.algorithm == "ppo":
        return critic.Critic(s, device)
    return groups.Group({"grpo": groups.grpo, "rloo": groups.rloo}[s.algorithm], s.responses_per_prompt)


def draw(problems, iteration, s):
    """The problems of an iteration, drawn with replacement; a resumed run draws the same."""
    return random.Random(s.seed * 1_000_003 + iteration).choices(problems, k=s.prompts_per_iteration)


def train(s, run, engine, grader, tokenizer, problems, test_problems, device):
    """Algorithm 1 of the paper. Returns the exit code."""
    from rollout import episodes_for, evaluate, sample

    engine.sleep()
    estimator, trainer = make_estimator(s, engine, grader, device), Trainer(s, device)
    evaluation = partial(evaluate, engine, grader, test_problems, s)
    run.join(engine, grader, trainer, estimator, tokenizer, evaluation)
    if not run.agrees(problems):
        return 1
    with run.saved():
        for iteration in run.iterations():
            engine.seed(s.seed, iteration)
            drawn = engine.share(draw(problems, iteration, s))
            episodes = episodes_for(drawn, s.responses_per_prompt)
            # 1. Responses. Rollouts from the states of a response begin as soon as it ends.
            with run.phase("sample", can_stop=True):
                sample(engine, grader, episodes, s, on_response=estimator.start)
            # 2. The K rollouts from each state, whose mean reward is V(s_t). Waiting states move to idle engines.
            estimator.finish(run.phase)
            engine.sleep()
            with run.phase("train"):
                # 3. A_t = V(s_{t+1}) - V(s_t), and R - V(s_{T-1}) for the last step.
                episodes = engine.my_share(episodes)
                estimator.set_advantages(episodes)
                # 4. PPO: clipped ratio, KL to the reference.
                metrics = trainer.update(episodes) | estimator.update(episodes)
            with run.phase("sync"):
                engine.load_weights(trainer.weights())
            run.finished(episodes, metrics)
    return run.exit_code()


def evaluate_only(s, engine, grader, problems):
    """Print the accuracy of --model. Returns the exit code; a signal ends it at once."""
    from rollout import evaluate

    engine.seed(s.seed)
    with engine.watch.phase("evaluate"):
        episodes = evaluate(engine, grader, problems, s)
    accuracy = evaluation_metrics(episodes, engine.tensor_parallel)["accuracy"]
    if engine.watch.rank == 0:
        n, how = len(problems), f"temperature {s.eval_temperature}, top_p {s.top_p}"
        print(f"accuracy {accuracy:.4f} ({n} problems, {n * s.eval_samples} responses, {how})")
    return 0


def main():
    first = os.environ.get("RANK", "0") == "0"
    try:
        check_gpus()
        s = parse_settings(sys.argv[1:])
        check(s, world_size())
        run = None if s.eval_only else Run(s)
        if run and run.has_ended():
            if first:
                print(
                    f"{run.folder} is finished, its model is in model/: name another --run_dir for a new run"
                )
            return
        splits = data.load_for(s)
        tokenizer = load_tokenizer(s)
        day = run.day if run else None
        problems, test_problems = data.encode_splits(splits, tokenizer, s, print if first else None, day)
        test_problems = test_problems[: s.eval_problems]
        if first:
            ids = (p.prompt_ids for part in (problems, test_problems) for p in part)
            critic = run and s.algorithm == "ppo"
            check_supported(s.model, ids, s.trust_remote_code, critic, tokenizer)
        if run and first:
            run.lock()
            inputs = {"--model": fingerprint(s.model), "--dataset": data.fingerprint(problems)}
            run.check_inputs(inputs | {"day": str(run.day)})
    except (ValueError, OSError) as error:
        refuse(f"train.py: {error}")
    device = init_distributed()
    if first:
        print(f"starting the engine and loading {s.model}")
    with Watch(s.hang_timeout, s.tensor_parallel_size) as watch:
        from rollout import Engine, shut_down  # importing vLLM takes seconds: after the checks

        engine, grader = Engine(s, watch), Grader(on_graded=watch.beat)
        if s.eval_only:
            code = evaluate_only(s, engine, grader, test_problems)
        else:
            code = train(s, run, engine, grader, tokenizer, problems, test_problems, device)
        shut_down(engine, grader)
    exit_all(code)


if __name__ == "__main__":
    main()
