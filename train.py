"""VinePPO (arXiv 2410.01679): PPO for LLM reasoning, with values measured by rollouts, not by a network.

    torchrun --nproc_per_node=2 train.py --dataset arithmetic --model runs/sft     # GPU or CPU; see `make demo`
    torchrun --nproc_per_node=8 train.py --dataset math        # the paper's Rho-1B run
    torchrun --nproc_per_node=8 train.py --dataset math --run_dir runs/math-7b \
        --model realtreetune/deepseekmath-7b-sft-MATH-v2 --max_sequence 2499       # DeepSeekMath-7B's
    torchrun --nproc_per_node=8 train.py --dataset math --run_dir runs/ppo --algorithm ppo  # or grpo, rloo
    python train.py --dataset gsm8k --model MODEL --eval_only                  # accuracy alone

Read `train` below first: Algorithm 1 of the paper. Then episode.py (the records), rollout.py
(sampling), vine.py (values and advantages), ppo.py (the update), model.py (the sharded policy).
docs/differences.md lists what differs from the paper.
"""

import support.startup  # noqa: F401 (before torch is imported)

# isort: split
import os
import random
import sys
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from transformers.utils import logging

import data
from grader import Grader
from model import check_supported
from ppo import Trainer
from steps import check_rule
from support.checks import check, check_given
from support.metrics import evaluation_metrics
from support.pretrained import fingerprint, load_tokenizer
from support.ranks import check_gpus, exit_all, init_distributed, refuse
from support.run import Run
from support.settings import parse, setting, unescaped
from support.watch import Stopped, Watch
from vine import Vine

logging.disable_progress_bar()  # transformers' own bars, one a file


@dataclass
class Settings:
    """The values are the paper's for MATH with Rho-1B (released config rho1b). PRESETS replaces some."""

    # the run
    dataset: str = setting(
        "arithmetic", "math, gsm8k, arithmetic or worded (both built in), or a path (see data.py)"
    )
    model: str | None = setting("realtreetune/rho-1b-sft-MATH", "Hugging Face folder or hub name")
    algorithm: str = setting("vineppo", "whose advantages", choices=["vineppo", "ppo", "grpo", "rloo"])
    run_dir: str | None = setting(None, "folder of the run; None: runs/DATASET", may_change=True)
    resume: bool = setting(False, "fail without a checkpoint; resuming is automatic", may_change=True)
    iterations: int = setting(1000, "rounds of sampling and update", min=1)
    seed: int = setting(0, "of the problems, the sampling and the minibatches")
    # problems and prompts
    prompt_template: str | None = setting(None, "prompt with {problem} in it; None: the paper's")
    chat: bool = setting(False, "put the prompt into the tokenizer's chat template")
    max_bad_answers: float = setting(
        0.03, "largest share of gold answers that nothing can match", min=0, max=1, may_change=True
    )
    # advantages
    K: int = setting(9, "vineppo: rollouts that estimate the value of each state", min=1)
    step_credit: str = setting("paper", "vineppo: paper, newline, sentence, tokens:N, cutpoints:N")
    baseline_smoothing: float = setting(0.0, "vineppo: earlier values' share in baselines", min=0, max=1)
    share_responses: bool = setting(False, "vineppo: other responses are rollouts too, in baselines")
    max_valued_steps: int | None = setting(None, "vineppo: value only a response's first N states", min=1)
    gae_lambda: float | None = setting(None, "lambda of GAE; None: vineppo 0, ppo 1", min=0, max=1)
    gamma: float = setting(1.0, "ppo: discount per token", min=0, max=1)
    critic_learning_rate: float | None = setting(None, "ppo: the critic's; None: --learning_rate", above=0)
    # sampling
    prompts_per_iteration: int = setting(64, "problems drawn, with replacement", min=1)
    responses_per_prompt: int = setting(8, "responses sampled for each of them", min=1)
    temperature: float = setting(0.6, "of sampling, and the trainer's logits", above=0)
    top_p: float = setting(0.9, "nucleus of responses and rollouts", above=0, max=1)
    max_tokens: int = setting(1024, "token limit of a response, and of prefix and rollout together", min=1)
    max_sequence: int = setting(2048, "token limit of prompt and response together", min=1)
    stop: str | None = setting("\n\n\nProblem:", "string that ends a response, besides EOS")
    # the update
    learning_rate: float = setting(1e-6, "peak; 3 percent warm-up, then linear decay to 0", above=0)
    minibatch: int = setting(64, "responses per optimizer step, over all ranks", min=1)
    micro_batch_tokens: int = setting(
        8192, "tokens per forward pass of a rank: memory, speed", min=1, may_change=True
    )
    epochs: int = setting(2, "passes over an iteration's responses", min=1)
    clip: float = setting(0.2, "range of the probability ratio, 1 - clip .. 1 + clip", min=0)
    mask_above: float | None = setting(None, "train on tokens up to this probability", above=0, max=1)
    kl_coef: float = setting(1e-4, "weight of the KL penalty to the initial policy", min=0)
    max_grad_norm: float = setting(1.0, "gradients are scaled down to this norm", above=0)
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
    eval_top_p: float = setting(0.9, "nucleus of evaluations", above=0, max=1, may_change=True)
    save_every: int = setting(50, "iterations between checkpoints; 0: none", min=0, may_change=True)
    store_every: int = setting(
        50, "iterations between stored responses (show.py); 0: never", min=0, may_change=True
    )
    report_to: str = setting(
        "none", "none, tensorboard or wandb: send the metrics there too", may_change=True
    )
    # the machine
    bfloat16: bool | None = setting(None, "compute in bfloat16; None: on GPUs only")
    hybrid_sharding: bool = setting(False, "replicate across machines", may_change=True)
    tensor_parallel_size: int = setting(1, "ranks that share an engine", min=1, may_change=True)
    gpu_memory: float = setting(
        0.6, "share of a GPU for the engine while it samples", above=0, max=1, may_change=True
    )
    max_sequences: int | None = setting(None, "sequences an engine writes at once", min=1, may_change=True)
    hang_timeout: float = setting(90.0, "seconds without progress of a rank", above=0, may_change=True)
    strict: bool = setting(False, "stop if engine and trainer disagree, not only warn", may_change=True)
    trust_remote_code: bool = setting(False, "let a hub model run code of its own", may_change=True)


TINY = dict(  # of the built-in tasks' tiny models, whose cache has many blocks even with little gpu_memory
    iterations=80, prompts_per_iteration=32, responses_per_prompt=2, K=4, temperature=1.0, top_p=1.0, stop=None,
    learning_rate=1e-4, minibatch=32, micro_batch_tokens=4096, eval_every=20, eval_samples=2, gpu_memory=0.1,
    eval_temperature=1.0, eval_top_p=1.0, save_every=40, store_every=20,
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
    s.stop = unescaped(s.stop)
    s.run_dir = s.run_dir or f"runs/{Path(s.dataset).resolve().stem or 'data'}"
    return s


def make_engine(s, watch):
    """This rank's engine. Importing vLLM takes seconds: only after the checks."""
    from rollout import Engine

    return Engine(
        s.model, max_sequence=s.max_sequence, stop=[s.stop] if s.stop else [], bfloat16=s.bfloat16,
        gpu_memory=s.gpu_memory, max_sequences=s.max_sequences, tensor_parallel=s.tensor_parallel_size,
        trust_remote_code=s.trust_remote_code, on_step=watch.step,
    )  # fmt: skip


def make_trainer(s, device, whiten):
    return Trainer(
        s.model, device, learning_rate=s.learning_rate, clip=s.clip, kl_coef=s.kl_coef,
        temperature=s.temperature, mask_above=s.mask_above, whiten_advantages=whiten, **learning(s),
    )  # fmt: skip


def make_estimator(s, engine, grader, device):
    """Where the advantages come from. A new algorithm: an Estimator, and its lines here."""
    if s.algorithm == "vineppo":
        return Vine(engine, grader, s)
    from baselines import critic, groups  # the one import that points outwards

    if s.algorithm == "ppo":
        rate, lam = s.critic_learning_rate or s.learning_rate, 1.0 if s.gae_lambda is None else s.gae_lambda
        options = dict(learning_rate=rate, gamma=s.gamma, gae_lambda=lam)
        return critic.Critic(s.model, device, **options, **learning(s))
    return groups.Group({"grpo": groups.grpo, "rloo": groups.rloo}[s.algorithm], s.responses_per_prompt)


def learning(s):
    """What the policy and a critic have in common; see Learner and load_sharded."""
    minibatches = s.prompts_per_iteration * s.responses_per_prompt // s.minibatch
    loading = dict(bfloat16=s.bfloat16, hybrid=s.hybrid_sharding, trust_remote_code=s.trust_remote_code)
    return dict(
        total_steps=s.iterations * s.epochs * minibatches, minibatch=s.minibatch, epochs=s.epochs,
        micro_batch_tokens=s.micro_batch_tokens, max_grad_norm=s.max_grad_norm, seed=s.seed,
        loading=loading,
    )  # fmt: skip


def train(s, run, tokenizer, problems, test_problems, device, watch):
    """Algorithm 1 of the paper. Returns the exit code."""
    engine, grader = make_engine(s, watch), Grader(on_graded=watch.beat)
    from rollout import episodes_for, sample, shut_down

    engine.sleep()
    estimator = make_estimator(s, engine, grader, device)
    trainer = make_trainer(s, device, whiten=estimator.whiten)
    watch.follow(trainer.policy, trainer.reference, *estimator.networks)
    run.join(watch, engine, grader, trainer, estimator, tokenizer)
    engine.load_weights(watch.each(trainer.weights()))
    if not run.engine_agrees(problems):
        shut_down(engine, grader, watch)
        return 1
    engine.load_weights(watch.each(trainer.weights()))  # it was put to sleep for the comparison
    watch.graceful = True
    try:
        run.begin(evaluate_if_due(run.done, run, engine, grader, test_problems, s))
        for iteration in run.iterations():
            engine.seed(s.seed, iteration)  # a resumed run draws the same problems and samples
            rng = random.Random(s.seed * 1_000_003 + iteration)
            drawn = rng.choices(problems, k=s.prompts_per_iteration)  # with replacement
            episodes = episodes_for(engine.share(drawn), s.responses_per_prompt)

            # 1. Responses. Rollouts from the states of a response begin as soon as it ends.
            with run.phase("sample", can_stop=True):
                sample(engine, grader, episodes, s, on_response=estimator.start)
            # 2. V(s_t): the mean reward of K rollouts. Waiting states move to engines with less to do.
            with run.phase("values"):
                estimator.rebalance()
            with run.phase("values", can_stop=True):
                estimator.finish()
            engine.sleep()
            episodes = engine.my_share(episodes)
            # 3. A_t = V(s_{t+1}) - V(s_t), and R - V(s_{T-1}) for the last step.
            with run.phase("values"):
                estimator.set_advantages(episodes)
            # 4. PPO: clipped ratio, KL to the reference.
            with run.phase("train"):
                metrics = trainer.update(episodes) | estimator.update(episodes)
            with run.phase("sync"):
                engine.load_weights(watch.each(trainer.weights()))

            evaluated = evaluate_if_due(iteration + 1, run, engine, grader, test_problems, s)
            run.finished(iteration, episodes, metrics, evaluated)  # metrics line, checkpoint
        run.end()  # the final model
    except Stopped:  # on all ranks, after a signal or a failure
        run.save_and_stop()
    shut_down(engine, grader, watch)
    return watch.exit_code() if watch.agreed else 0


def evaluate_if_due(done, run, engine, grader, problems, s):
    """Episodes of the evaluation after `done` iterations; None if none is due, or if the run is to stop.

    run.begin or run.finished then raise Stopped, once what was done before is written.
    """
    if not run.evaluation_is_due(done):
        return None
    from rollout import evaluate

    engine.seed(s.seed, done, 1)
    with suppress(Stopped), run.phase("evaluate", can_stop=True):
        return evaluate(engine, grader, problems, s)


def evaluate_only(s, problems, watch):
    """Print the accuracy of --model. Returns the exit code; a signal ends it at once."""
    engine, grader = make_engine(s, watch), Grader(on_graded=watch.beat)
    from rollout import evaluate, shut_down

    engine.seed(s.seed)
    with watch.phase("evaluate"):
        episodes = evaluate(engine, grader, problems, s)
    accuracy = evaluation_metrics(episodes, engine.tensor_parallel)["accuracy"]
    if watch.rank == 0:
        n, how = len(problems), f"temperature {s.eval_temperature}, top_p {s.eval_top_p}"
        print(f"accuracy {accuracy:.4f} ({n} problems, {n * s.eval_samples} responses, {how})")
    shut_down(engine, grader, watch)
    return 0


def main():
    first = os.environ.get("RANK", "0") == "0"
    try:
        check_gpus()
        s = parse_settings(sys.argv[1:])
        check(s, int(os.environ.get("WORLD_SIZE", 1)))
        run = None if s.eval_only else Run(s)
        if run and run.has_ended():
            done = f"{run.folder} is finished: its model is {run.folder / 'model'}"
            return print(f"{done}; name another --run_dir for a new run") if first else None
        splits = data.load(s.dataset, s.prompt_template, s.chat)
        tokenizer = load_tokenizer(s)
        problems, test_problems = data.encode_splits(splits, tokenizer, s, print if first else None)
        test_problems = test_problems[: s.eval_problems]
        if run and first:
            run.lock()
            check_supported(s.model, [p.prompt_ids for p in problems + test_problems], s.trust_remote_code)
            run.check_inputs({"--model": fingerprint(s.model), "--dataset": data.fingerprint(problems)})
    except (ValueError, OSError) as error:
        refuse(f"train.py: {error}")
    device = init_distributed()
    if first:
        print(f"starting the engine and loading {s.model}")
    with Watch(s.hang_timeout, s.tensor_parallel_size) as watch:
        parts = run, tokenizer, problems, test_problems, device
        code = train(s, *parts, watch) if run else evaluate_only(s, test_problems, watch)
    exit_all(code)


if __name__ == "__main__":
    main()
