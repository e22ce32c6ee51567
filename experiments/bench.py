"""What the implementation costs, as ratios measured side by side.

    python experiments/bench.py                         # all of it; 33 minutes on two cores
    python experiments/bench.py --only head stream      # some of it
    python experiments/bench.py --model realtreetune/rho-1b-sft-MATH    # on a GPU

The model is a tiny random one, or with --model a real one, with MATH prompts. It prints a table and
writes experiments/results/bench-DEVICE.json.

Every part runs in a process of its own, so that its memory is its own. Two things that are compared
take turns, and the medians of their times count (growth: means); absolute numbers belong to the
machine. Memory is the device's peak (on CPU the process's resident peak) above what it held before.
"""

import argparse
import gc
import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import fields, replace
from functools import partial
from pathlib import Path

# freed memory leaves the process at once, so that its peak shows
os.environ.setdefault("MALLOC_MMAP_THRESHOLD_", "1048576")
sys.path.insert(0, str(Path(__file__).parent.parent))
from experiments import common

# isort: split
import torch
from transformers import AutoModelForCausalLM

import data
import ppo
import train
from dealing import DealtVine
from episode import Episode, State
from grader import Grader
from model import ChunkedLogprobs, full_tensors, load_sharded
from steps import step_boundaries
from support.pretrained import load_tokenizer
from support.ranks import gather_lists, init_distributed
from tasks.tiny_model import write_model

ON_GPU = torch.cuda.is_available()


# --- measuring ---


def peak(work):
    """(bytes of memory at the peak of work() above those before it, its result)"""
    gc.collect()
    if ON_GPU:
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        result = work()
        return torch.cuda.max_memory_allocated() - before, result
    Path("/proc/self/clear_refs").write_text("5")  # the resident peak starts again
    before = _resident("VmRSS")
    result = work()
    return _resident("VmHWM") - before, result


def _resident(name):
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(name))


def seconds(work):
    if ON_GPU:
        torch.cuda.synchronize()
    start = time.perf_counter()
    work()
    if ON_GPU:
        torch.cuda.synchronize()
    return time.perf_counter() - start


def take_turns(works, repeats):
    """Median seconds of each of the works."""
    times = [[seconds(work) for work in works] for _ in range(repeats)]
    return [statistics.median(column) for column in zip(*times)]


def row(what, value, unit="", aim="", note=""):
    return dict(what=what, value=value, unit=unit, aim=aim, note=note)


# --- the workload ---


def tiny_model(folder, vocab_size=4096, **changes):
    """A random Llama whose tokens are letters, except that one in 128 is a "!", the stop string.

    So most texts end early, and a few at the limit.
    """
    enders = [f"!{i}" for i in range(vocab_size // 128)]
    count = vocab_size - len(enders) - 3  # <pad>, <bos> and <eos> come first
    letters = [chr((0x4E00 if i < 20_000 else 0xAC00 - 20_000) + i) for i in range(count)]
    sizes = dict(num_hidden_layers=2, max_position_embeddings=2048) | changes
    write_model(folder, 0, [*enders, *letters], r"[\s\S]", **sizes)
    return folder


class Workload:
    """Settings, problems with their prompt ids, and an engine and a grader for them.

    With a model: MATH's prompts. Without: the shape of MATH, four times smaller, for a machine
    without a GPU.
    """

    def __init__(self, model, folder, prompts=4, watch=None, **changes):
        from rollout import Engine

        self.device = init_distributed()
        made = (Path(folder) / "config.json").exists()
        self.model = model or (folder if made else tiny_model(folder))
        s = train.parse_settings(["--dataset", "math", "--model", str(self.model)])
        if model:
            problems = data.load("math")[0][: 20 * prompts]
            limit = s.max_sequence - s.max_tokens
            self.problems = data.encode(problems, load_tokenizer(s), limit)[0][:prompts]
        else:
            sizes = dict(max_tokens=512, max_sequence=768)
            s = replace(s, **sizes, stop="!", temperature=1.0, top_p=1.0, step_credit="tokens:32")
            rng, self.problems = random.Random(0), []
            for _ in range(prompts):
                ids = [rng.randrange(100, 4000) for _ in range(rng.randrange(100, 240))]
                self.problems.append(data.Problem("", "", prompt_ids=ids))
        self.s = replace(s, gpu_memory=0.4, **changes)
        self.engine = Engine(self.s, watch)
        self.engine.seed(0)
        self.grader = Grader(1)

    def forget_prefixes(self):
        if not self.engine.llm.reset_prefix_cache():
            raise RuntimeError("requests are running")

    def begin(self, streaming=True, grader=None, problems=None, **changes):
        """The responses of one iteration: (episodes, their estimator, whose rollouts are under way)."""
        from rollout import episodes_for, sample

        s, grader, self.engine.steps = replace(self.s, **changes), grader or self.grader, 0
        self.forget_prefixes()
        vine = DealtVine(self.engine, grader, s)
        episodes = episodes_for(problems or self.problems, s.responses_per_prompt)
        sample(self.engine, grader, episodes, s, on_response=vine.start if streaming else None)
        for e in [] if streaming else episodes:
            vine.start(e)
        self.value_cache = self.engine.prefix_cache_counts()
        return episodes, vine

    def iterate(self, *arguments, **changes):
        """One iteration's rollouts on one rank: its episodes, with advantages."""
        episodes, vine = self.begin(*arguments, **changes)
        vine.wait()
        vine.set_advantages(episodes)
        return episodes


def states_in(episodes):
    """The distinct states."""
    return {state for e in episodes for state in e.states}


def tokens_of(episodes):
    """Sampled tokens: of the responses, and of the rollouts from their states."""
    rollouts = [rollout for state in states_in(episodes) for rollout in state.rollouts]
    return sum(len(e.response_ids) for e in episodes) + sum(len(r.token_ids) for r in rollouts)


# --- rollouts ---


def bench_stream(a, folder):
    """Rollouts of a state begin when its response ends, against: when all responses have ended."""
    w, found = Workload(a.model, folder), {True: [], False: []}
    for _ in range(2 * a.repeats):
        for streaming in (True, False):
            start = time.perf_counter()
            tokens = tokens_of(w.iterate(streaming))
            found[streaming].append((w.engine.steps, tokens / (time.perf_counter() - start)))
    steps = {k: [steps for steps, _ in v] for k, v in found.items()}
    mean = {k: statistics.mean(v) for k, v in steps.items()}
    ratio = mean[True] / mean[False]
    error = ratio * sum((statistics.stdev(v) / mean[k]) ** 2 / len(v) for k, v in steps.items()) ** 0.5
    speed = {k: statistics.median(speed for _, speed in v) for k, v in found.items()}
    note = f"± {error:.2f}; {mean[True]:.0f} steps"
    return [
        row("engine steps, of two phases", ratio, aim="<= 0.9", note=note),
        row("time per token, of two phases", speed[False] / speed[True]),
    ]


def generate(engine, prompts, n, max_tokens, temperature, top_p=1.0, logprobs=False):
    """n completions of each prompt, a list of token ids. max_tokens: one limit, or one per prompt."""
    limits = max_tokens if isinstance(max_tokens, list) else [max_tokens] * len(prompts)
    records = [State(prompt, []) for prompt in prompts]
    for record, limit in zip(records, limits):
        engine.submit(record, n, limit, temperature, top_p, logprobs)
    while engine.running:
        for record, completions in engine.step():
            record.receive(completions)
    return [record.rollouts for record in records]


def bench_generate(a, folder):
    """Engine.submit and step against LLM.generate on the value prompts of an iteration."""
    from vllm import SamplingParams

    w = Workload(a.model, folder)
    s, engine, prompts, limits = w.s, w.engine, [], []
    for e in w.iterate():
        for cut in e.boundaries[:-1]:
            prompts.append(e.prompt_ids + e.response_ids[:cut])
            limits.append(s.max_tokens - cut)
    sampling = dict(n=s.K, temperature=s.temperature, top_p=s.top_p)
    stop = dict(stop=engine.stop or None, detokenize=bool(engine.stop))

    def ours():
        return generate(engine, prompts, max_tokens=limits, **sampling)

    def raw():
        params = [SamplingParams(max_tokens=limit, **sampling, **stop) for limit in limits]
        inputs = [{"prompt_token_ids": ids} for ids in prompts]
        return [output.outputs for output in engine.llm.generate(inputs, params, use_tqdm=False)]

    speeds = {ours: [], raw: []}  # tokens per second
    for _ in range(a.repeats):
        for work in speeds:
            w.forget_prefixes()
            start = time.perf_counter()
            tokens = sum(len(c.token_ids) for completions in work() for c in completions)
            speeds[work].append(tokens / (time.perf_counter() - start))
    speed, of_raw = (statistics.median(speeds[work]) for work in (ours, raw))
    note = f"{speed:.0f} per second"
    return [row("tokens per second, of one LLM.generate", speed / of_raw, aim=">= 0.95", note=note)]


def bench_cache(a, folder):
    """The engine's counters while the values alone are sampled, in a phase of their own."""
    w = Workload(a.model, folder)
    w.iterate(streaming=False)
    before = w.engine.prefix_cache_counts()
    episodes = w.iterate(streaming=False)
    after = w.engine.prefix_cache_counts()
    asked, found = (x - y for x, y in zip(after, w.value_cache))
    asked_all, found_all = (x - y for x, y in zip(after, before))
    total = sum(len(e.states) for e in episodes)
    shared = 1 - len(states_in(episodes)) / total
    cached, note = "value prompts' tokens that come from the prefix cache", f"{asked:.0f} tokens"
    return [
        row(cached, found / asked, aim=">= 0.9", note=note),
        row("of all prompts' tokens", found_all / asked_all),
        row("states that another response of the group has, too", shared, note=f"of {total}"),
    ]


class NoGrader:
    """Gives no reward, and takes no time."""

    def begin(self, record):
        pass

    def set_rewards(self, records):
        pass


def bench_grading(a, folder):
    """An iteration whose every rollout ends in a formula to be compared, against one without a grader."""
    w, rng = Workload(a.model, folder), random.Random(0)
    plain_step, times = w.engine.step, {True: [], False: []}

    def step_with_formulas():
        ended = plain_step()
        for _, completions in ended:
            for c in completions:  # as many distinct answers as a hard problem has
                c.text += f" \\boxed{{\\frac{{{rng.randrange(40)}}}{{\\sqrt{{7}}}}}}"
        return ended

    w.engine.step = step_with_formulas
    golds = [f"\\frac{{{i}\\sqrt{{7}}}}{{7}}" for i in range(len(w.problems))]
    problems = [replace(p, answer=gold) for p, gold in zip(w.problems, golds)]
    for _ in range(2 * a.repeats):
        for graded in (True, False):
            w.grader.cache.clear()
            start = time.perf_counter()
            tokens = tokens_of(w.iterate(grader=None if graded else NoGrader(), problems=problems))
            times[graded].append((time.perf_counter() - start) / tokens)
    ratio = statistics.median(times[True]) / statistics.median(times[False])
    counts = w.grader.counts
    pairs = f"{counts['graded']} distinct, {counts['cached']} known pairs"
    note = f"{pairs}; a core is left to the grader"
    return [row("rollouts with grading, of without", ratio, aim="<= 1.02", note=note)]


def bench_growth(a, folder):
    """Time and tokens of an iteration's rollouts against K, steps per response and responses.

    Means of repeats that take turns.
    """
    w = Workload(a.model, folder)
    cases = {f"K = {k}": dict(K=k) for k in (1, 3, 9, 18)}
    for n in () if a.model else (128, 64, 32, 16):
        cases[f"steps of {n} tokens"] = dict(step_credit=f"tokens:{n}")
    for n in (2, 4, 8, 16):
        cases[f"{n} responses per prompt"] = dict(responses_per_prompt=n)
    found = {name: [] for name in cases}  # (seconds, tokens, states, engine steps)
    w.iterate()
    for _ in range(a.repeats):
        for name, changes in cases.items():
            start = time.perf_counter()
            episodes = w.iterate(**changes)
            took = time.perf_counter() - start
            found[name].append((took, tokens_of(episodes), len(states_in(episodes)), w.engine.steps))
    rows = []
    for name, measured in found.items():
        took, tokens, states, steps = map(statistics.mean, zip(*measured))
        note = f"{tokens:.0f} tokens, {states:.0f} states, {steps:.0f} engine steps"
        rows.append(row(name, took, "s", note=note))
    return rows


def bench_ranks(a, folder):
    """Two processes of one thread each against one; on GPUs: two GPUs against one."""
    if ON_GPU and torch.cuda.device_count() < 2:
        return []
    model = a.model or "tiny"
    speeds, idle = {1: [], 2: []}, []
    for repeat in range(a.repeats):
        for ranks in speeds:
            torchrun = f"-m torch.distributed.run --standalone --nproc_per_node={ranks}".split()
            command = [sys.executable, *torchrun, __file__, "--rank_of", model, str(repeat)]
            environment = os.environ | {"OMP_NUM_THREADS": "1"}
            done = subprocess.run(command, env=environment, capture_output=True, text=True)
            if done.returncode:
                raise RuntimeError(done.stderr)
            found = json.loads(done.stdout.splitlines()[-1])
            speeds[ranks].append(found["speed"])
            idle += [found["idle"]] if ranks == 2 else []
    one, two = (statistics.median(speeds[n]) for n in (1, 2))
    each = ", ".join(" and ".join(f"{share:.2f}" for share in run) for run in idle)
    waits = statistics.mean(map(statistics.mean, idle))
    note = f"{two:.0f} per second"
    return [
        row("tokens per second of two ranks, of one", two / one, aim=">= 1.7", note=note),
        row("share of the time that a rank waits for the other", waits, note=f"each: {each}"),
    ]


def one_rank(model, seed):
    """A rank of bench_ranks: three iterations, of which the last two count.

    Of 64 responses per rank, as many as the paper's on 8 GPUs.
    """
    import torch.distributed as dist

    from rollout import shut_down
    from support.watch import Watch

    init_distributed()
    with Watch() as watch:
        with tempfile.TemporaryDirectory() as folder:
            if dist.get_rank() == 0:
                tiny_model(folder)
            folders = gather_lists([folder])  # rank 0's has the model
            w = Workload(None if model == "tiny" else model, folders[0], prompts=8, watch=watch)
            w.engine.seed(seed)
            dist.barrier()
        wall, busy, tokens = 0.0, 0.0, 0
        for i in range(3):
            dist.barrier()
            start = time.perf_counter()
            episodes, vine = w.begin()
            sampled = time.perf_counter()
            vine.rebalance()
            dealt = time.perf_counter()
            vine.wait()
            ended = time.perf_counter()
            vine.set_advantages(episodes)
            if i:
                wall, busy = wall + time.perf_counter() - start, busy + (sampled - start) + (ended - dealt)
                tokens += tokens_of(episodes)
        ranks = gather_lists([(1 - busy / wall, tokens)])
        if dist.get_rank() == 0:
            speed = sum(n for _, n in ranks) / wall
            print(json.dumps(dict(speed=speed, idle=[idle for idle, _ in ranks])))
        shut_down(w.engine, w.grader)


def bench_sync(a, folder):
    """Memory at the peak of a weight sync above both models, in layers of the model."""
    from torch.distributed.fsdp import FSDPModule

    from rollout import Engine

    device = init_distributed()
    wide = dict(hidden_size=1024, intermediate_size=4096, num_hidden_layers=8)
    model = a.model or tiny_model(folder, **wide)
    engine = Engine(train.Settings(model=str(model), max_sequence=512, stop=None, gpu_memory=0.4))
    policy = load_sharded(model, device)
    engine.load_weights(full_tensors(policy))
    most, _ = peak(lambda: engine.load_weights(full_tensors(policy)))
    layers = [m for m in policy.modules() if isinstance(m, FSDPModule) and m is not policy]
    layer, total = max(map(_bytes, layers)), _bytes(policy)
    what = "memory of a weight sync above both models, in layers"
    note = f"a layer: {layer / 1e6:.0f} MB of {total / 1e6:.0f}"
    return [row(what, most / layer, aim="<= 1", note=note)]


def _bytes(module):
    return sum(p.numel() * 4 for p in module.parameters())


# --- training ---


def bench_head(a, folder):
    """Log-probabilities with a vocabulary of 128k and width 1024, forward and backward.

    The chunked head against all logits at once.
    """
    vocabulary, width, tokens = 128_000, 1024, 4096
    device = init_distributed()
    torch.manual_seed(0)
    head = torch.nn.Linear(width, vocabulary, bias=False, device=device)
    hidden = torch.randn(tokens, width, device=device, requires_grad=True)
    targets = torch.randint(vocabulary, (tokens,), device=device)

    def clear():
        head.zero_grad()
        hidden.grad = None

    def chunked():
        clear()
        ChunkedLogprobs.apply(hidden, head.weight, None, targets, 0.6).mean().backward()

    def plain():
        clear()
        (head(hidden) / 0.6).log_softmax(-1).gather(1, targets[:, None]).mean().backward()

    grads = []
    for work in (chunked, plain):
        work()
        grads.append((head.weight.grad.clone(), hidden.grad.clone()))
    difference = max(((x - y).norm() / y.norm()).item() for x, y in zip(*grads))
    del grads
    memory = []
    for work in (chunked, plain):
        head.zero_grad()
        memory.append(peak(work)[0])
    most, most_plain = memory
    time_chunked, time_plain = take_turns([chunked, plain], a.repeats)
    note = f"{most / 1e9:.1f} of {most_plain / 1e9:.1f} GB"
    return [
        row("head's memory, of all logits at once", most / most_plain, aim="<= 0.25", note=note),
        row("head's time, of all logits at once", time_chunked / time_plain, aim="<= 1.15"),
        row("largest relative difference of a gradient", difference, aim="~ 1e-6"),
    ]


def plain_update(s):
    """simple.py's update with its own networks: a function of responses."""
    import simple

    load = AutoModelForCausalLM.from_pretrained
    policy, reference = (load(s.model, dtype=torch.float32).to(simple.device) for _ in range(2))
    optimizer = torch.optim.AdamW(policy.parameters(), lr=s.learning_rate, weight_decay=0.0)
    return partial(simple.update, policy, reference, optimizer, s=s)


def plain_trainer(s, device):
    """A Trainer that keeps its activations on GPUs too, as simple.py does."""
    plain, ppo.load_sharded = ppo.load_sharded, partial(load_sharded, checkpoint_activations=False)
    try:
        return ppo.Trainer(s, device)
    finally:
        ppo.load_sharded = plain


def bench_update(a, folder):
    """The trainer's update against a padded one that keeps all logits (simple.py).

    On 32 responses of skewed lengths; the head has a real size.
    """
    import simple

    device = init_distributed()
    sizes = dict(vocab_size=16_000, hidden_size=192, intermediate_size=576)
    model = str(a.model or tiny_model(folder, **sizes))
    rng, limit, episodes, responses = random.Random(0), 512, [], []
    for n in [min(limit, 1 + int(rng.expovariate(1 / 128))) for _ in range(32)]:
        prompt = [rng.randrange(2, 16_000) for _ in range(rng.randrange(50, 120))]
        response = [rng.randrange(2, 16_000) for _ in range(n)]
        advantages, zeros = [rng.gauss(0, 1)] * n, [0.0] * n
        episodes.append(Episode(prompt, response_ids=response, advantages=advantages, engine_logprobs=zeros))
        sampled = tuple(prompt), (), "", tuple(response), "", 0.0
        responses.append(simple.Rollout(*sampled, advantages=torch.tensor(advantages)))
    parts = [episodes[i : i + 8] for i in range(0, 32, 8)]
    real, padded = sum(map(len, episodes)), sum(8 * max(map(len, part)) for part in parts)
    options = dict(model=model, learning_rate=1e-6, minibatch=16)
    sizes = dict(iterations=1, prompts_per_iteration=32, responses_per_prompt=1, micro_batch_tokens=4096)
    s = train.Settings(**options | sizes, temperature=1.0, whiten=True)

    def ours():
        trainer = plain_trainer(s, device)
        return trainer, trainer.update(episodes)

    def plain():
        update = plain_update(simple.Settings(micro_batch=8, **options))
        return update, update(responses)

    most, (trainer, _) = peak(ours)
    most_plain, (update, _) = peak(plain)
    works = [partial(trainer.update, episodes), partial(update, responses)]
    time_ours, time_plain = take_turns(works, a.repeats)
    note = f"{most / 1e9:.2f} of {most_plain / 1e9:.2f} GB, models included"
    ratio, took = time_ours / time_plain, f"{time_ours:.1f} s"
    nothing = f"nothing is padded; in rows padded to the longest of 8: {real / padded:.2f}"
    return [
        row("update's memory, of the padded one with all logits", most / most_plain, note=note),
        row("update's time, of the padded one with all logits", ratio, note=took),
        row("tokens computed that are real", 1.0, aim=">= 0.9", note=nothing),
    ]


def bench_iteration(a, folder):
    """One whole iteration, rollouts and update, against simple.py; one rank."""
    import simple

    w = Workload(a.model, folder, minibatch=32, learning_rate=1e-6, whiten=True)
    names = {f.name for f in fields(simple.Settings)} & set(vars(w.s))
    s = simple.Settings(**{name: getattr(w.s, name) for name in names})
    trainer, update = plain_trainer(w.s, w.device), plain_update(s)
    starts = [(tuple(p.prompt_ids), (), p.answer) for p in w.problems]
    tokens, tokens_plain, sample = [], [], simple.sample

    def counted(*arguments):
        rollouts = sample(*arguments)
        tokens_plain[-1] += sum(len(r.ids) for r in rollouts)
        return rollouts

    def cut(_, *response):  # by the workload's rule: random texts have no lines
        return step_boundaries(w.s.step_credit, *response)

    simple.sample, simple.step_boundaries = counted, cut

    def ours():
        episodes = w.iterate()
        trainer.update(episodes)
        tokens.append(tokens_of(episodes))

    def plain():
        w.forget_prefixes()
        tokens_plain.append(0)
        update(simple.collect(w.engine.llm, w.grader, starts, s))

    ours()
    plain()
    most, most_plain = (peak(work)[0] for work in (ours, plain))
    time_ours, time_plain = take_turns([ours, plain], a.repeats)
    count = statistics.median(tokens)
    ratio, equal = count / statistics.median(tokens_plain), f"{count:.0f}; both value equal states once"
    took = f"{time_ours:.1f} of {time_plain:.1f} s"
    note = f"{most / 1e6:.0f} of {most_plain / 1e6:.0f} MB above models and engine"
    return [
        row("whole iteration's time, of a plain one", time_ours / time_plain, note=took),
        row("its sampled tokens, of a plain one", ratio, note=equal),
        row("its memory at the peak, of a plain one", most / most_plain, note=note),
    ]


# --- the program ---

PARTS = {
    "stream": bench_stream,
    "generate": bench_generate,
    "cache": bench_cache,
    "grading": bench_grading,
    "growth": bench_growth,
    "ranks": bench_ranks,
    "sync": bench_sync,
    "head": bench_head,
    "update": bench_update,
    "iteration": bench_iteration,
}


def measure(name, a):
    """The rows of a part, from a process of its own."""
    model = ["--model", a.model] if a.model else []
    command = [sys.executable, __file__, "--part", name, "--repeats", str(a.repeats), *model]
    environment = dict(os.environ)
    if name == "grading":  # one core is left to the grader's worker; beside a GPU all of them are
        environment["OMP_NUM_THREADS"] = str(max(1, len(os.sched_getaffinity(0)) - 1))
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"bench.py: {name} failed\n{done.stderr}")
    return json.loads(done.stdout.splitlines()[-1])


def main():
    parser = common.parser(__doc__)
    add, parts = parser.add_argument, f"of {', '.join(PARTS)}"
    add("--only", nargs="+", choices=PARTS, default=list(PARTS), metavar="PART", help=parts)
    add("--model", help="Hugging Face folder or hub name; default: a tiny random one, made anew")
    add("--repeats", type=int, default=3, help="measurements of each of two things that take turns")
    out = "default: experiments/results/bench-DEVICE.json; parts that are not run stay in it"
    add("--out", type=Path, help=out)
    add("--part", choices=PARTS, help=argparse.SUPPRESS)  # this process is the one of that part
    add("--rank_of", nargs=2, help=argparse.SUPPRESS)  # this process is a rank of bench_ranks: model, seed
    a = parser.parse_args()
    if a.repeats < 2:
        sys.exit("bench.py: --repeats must be at least 2: a ratio of single measurements says little")
    if a.rank_of:
        return one_rank(a.rank_of[0], int(a.rank_of[1]))
    if a.part:
        with tempfile.TemporaryDirectory() as folder:
            rows = PARTS[a.part](a, folder)
        print("\n" + json.dumps(rows), flush=True)
        os._exit(0)  # without the engine's exit hooks
    device = torch.cuda.get_device_name() if ON_GPU else f"{len(os.sched_getaffinity(0))} CPU cores"
    out = a.out or common.RESULTS / f"bench-{'gpu' if ON_GPU else 'cpu'}.json"
    found = json.loads(out.read_text()) if out.exists() else {}
    for name in a.only:
        print(f"\n{name}: {' '.join(PARTS[name].__doc__.split())}", flush=True)
        rows = measure(name, a)
        for r in rows:
            print(f"  {r['what']:58}{r['value']:10.3g} {r['unit']:3}{r['aim']:8}  {r['note']}", flush=True)
        found[name] = dict(device=device, model=a.model or "tiny", repeats=a.repeats, rows=rows)
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
