"""What the implementation costs, as ratios measured side by side: one table, and experiments/results/bench-DEVICE.json.

    python experiments/bench.py                         # all of it; 33 minutes on two cores, with a tiny random model
    python experiments/bench.py --only head stream      # some of it
    python experiments/bench.py --model realtreetune/rho-1b-sft-MATH       # on a GPU, with a real model and MATH prompts

Every part runs in a process of its own, so that its memory is its own. Two things that are compared take turns, and the medians of their times count (growth: means);
absolute numbers belong to the machine. Memory is the device's peak (on CPU the process's resident peak) above what stood before.
"""

import os

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # as in train.py
os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
os.environ.setdefault("MALLOC_MMAP_THRESHOLD_", "1048576")  # what is freed leaves the process at once, so that its peak can be seen

import argparse
import dataclasses
import gc
import json
import random
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from types import MethodType, SimpleNamespace

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))
RESULTS = ROOT / "experiments" / "results"

import torch

import ppo
import train

ON_GPU = torch.cuda.is_available()


# --- measuring ----------------------------------------------------------------------------------------------------------------------


def peak(work):
    """(Bytes of memory at the peak of work() above those before it, its result)"""
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
    return next(int(line.split()[1]) * 1024 for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(name))


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


# --- the workload -------------------------------------------------------------------------------------------------------------------


def tiny_model(folder, vocab_size=4096, **changes):
    """A random Llama whose tokens are letters, but one in 128 of them a "!", the stop string: most texts end early, a few at the limit."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    enders = [f"!{i}" for i in range(vocab_size // 128)]
    letters = [chr((0x4E00 if i < 20_000 else 0xAC00 - 20_000) + i) for i in range(min(30_000, vocab_size - 2 - len(enders)))]
    tokenizer = Tokenizer(models.WordLevel({x: i for i, x in enumerate(["<pad>", "<eos>", *enders, *letters])}, unk_token="<pad>"))
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.Split("", "isolated"), decoders.Fuse()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<eos>").save_pretrained(folder)
    torch.manual_seed(0)
    sizes = dict(
        hidden_size=128, intermediate_size=384, num_hidden_layers=2, num_attention_heads=4, max_position_embeddings=2048,
        bos_token_id=None, eos_token_id=1, pad_token_id=0, tie_word_embeddings=False,
    )  # fmt: skip
    LlamaForCausalLM(LlamaConfig(vocab_size=vocab_size, **(sizes | changes))).save_pretrained(folder)
    return folder


class Workload:
    """Settings, problems with their prompt ids, and an engine and a grader for them: MATH's shape, four times smaller, without a GPU."""

    def __init__(self, model, folder, prompts=4, **changes):
        from grader import Grader
        from rollout import Engine

        self.device = ppo.init_distributed()
        self.model = model or (folder if (Path(folder) / "config.json").exists() else tiny_model(folder))
        s = train.parse_settings(["--dataset", "math", "--model", str(self.model)])
        if model:
            import data

            tokenizer = train.load_tokenizer(s)
            problems, _ = data.encode(data.load("math", None, False)[0][: 20 * prompts], tokenizer, s.max_sequence - s.max_tokens, False)
            self.batch = problems[:prompts]
        else:
            small = dict(max_tokens=512, max_sequence=768, stop="!", temperature=1.0, top_p=1.0, step_credit="tokens:32")
            s = dataclasses.replace(s, **small)
            rng = random.Random(0)
            fake = [train.data.Problem("", "", "1") for _ in range(prompts)]
            self.batch = [(p, [rng.randrange(100, 4000) for _ in range(rng.randrange(100, 240))]) for p in fake]
        self.s = dataclasses.replace(s, activation_checkpointing=False, **changes)
        self.engine = Engine(self.model, max_sequence=s.max_sequence, stop=[s.stop] if s.stop else [], gpu_memory=0.4)
        self.engine.seed(0)
        self.grader = Grader(1)

    def begin(self, streaming=True, grader=None, batch=None, **changes):
        """The responses of one iteration: (episodes, their Values, of which some are under way)."""
        s, batch, self.engine.steps = dataclasses.replace(self.s, **changes), batch or self.batch, 0
        if not self.engine.llm.reset_prefix_cache():
            raise RuntimeError("requests are running")
        values = train.Values(self.engine, grader or self.grader, s)
        episodes = train.sample_responses(self.engine, grader or self.grader, batch, s, values if streaming else None)
        for e in [] if streaming else episodes:
            values.begin(e)
        self.value_cache = self.engine.prefix_cache_counts()
        return episodes, values

    def iterate(self, *arguments, **changes):
        """One iteration's rollouts on one rank: (episodes, what Values.set_advantages says)."""
        episodes, values = self.begin(*arguments, **changes)
        values.wait()
        return episodes, values.set_advantages(episodes)


def tokens_of(episodes, vined):
    return sum(len(e["response_ids"]) for e in episodes) + vined["tokens"]


# --- rollouts -----------------------------------------------------------------------------------------------------------------------


def bench_stream(a, folder):
    """Rollouts of a state begin when its response ends, against: when all responses have ended."""
    w, found = Workload(a.model, folder), {True: [], False: []}
    for _ in range(2 * a.repeats):
        for streaming in (True, False):
            start = time.perf_counter()
            tokens = tokens_of(*w.iterate(streaming))
            found[streaming].append((w.engine.steps, tokens / (time.perf_counter() - start)))
    steps = {k: [steps for steps, _ in v] for k, v in found.items()}
    ratio = statistics.mean(steps[True]) / statistics.mean(steps[False])
    error = ratio * sum((statistics.stdev(v) / statistics.mean(v)) ** 2 / len(v) for v in steps.values()) ** 0.5
    speed = {k: statistics.median(speed for _, speed in v) for k, v in found.items()}
    return [
        row("engine steps, of two phases", ratio, aim="<= 0.9", note=f"± {error:.2f}; {statistics.mean(steps[True]):.0f} steps"),
        row("time per token, of two phases", speed[False] / speed[True]),
    ]


def bench_generate(a, folder):
    """Engine.generate against LLM.generate on the value prompts of an iteration."""
    from vllm import SamplingParams

    w = Workload(a.model, folder)
    episodes, _ = w.iterate()
    states = [(e["prompt_ids"], e["response_ids"][:cut]) for e in episodes for cut in e["boundaries"][:-1]]
    prompts, limits = [p + r for p, r in states], [w.s.max_tokens - len(r) for _, r in states]
    counted = {}

    def ours():
        counted["ours"] = sum(
            len(c.token_ids) for group in w.engine.generate(prompts, w.s.K, limits, w.s.temperature, w.s.top_p) for c in group
        )

    def raw():
        stop = dict(stop=w.engine.stop or None, detokenize=bool(w.engine.stop))
        params = [SamplingParams(n=w.s.K, max_tokens=limit, temperature=w.s.temperature, top_p=w.s.top_p, **stop) for limit in limits]
        outputs = w.engine.llm.generate([{"prompt_token_ids": ids} for ids in prompts], params, use_tqdm=False)
        counted["raw"] = sum(len(c.token_ids) for output in outputs for c in output.outputs)

    speeds = {"ours": [], "raw": []}
    for _ in range(a.repeats):
        for name, work in (("ours", ours), ("raw", raw)):
            w.engine.llm.reset_prefix_cache()
            took = seconds(work)
            speeds[name].append(counted[name] / took)
    ours, raw = (statistics.median(speeds[k]) for k in ("ours", "raw"))
    return [row("tokens per second, of one LLM.generate", ours / raw, aim=">= 0.95", note=f"{ours:.0f} per second")]


def bench_cache(a, folder):
    """The engine's counters while the values alone are sampled: in two phases, so that they are apart."""
    w = Workload(a.model, folder)
    w.iterate(streaming=False)
    before = w.engine.prefix_cache_counts()
    episodes, vined = w.iterate(streaming=False)
    (asked, found), (asked_all, found_all) = (
        [x - y for x, y in zip(w.engine.prefix_cache_counts(), start)] for start in (w.value_cache, before)
    )
    total = sum(len(e["states"]) for e in episodes)
    return [
        row("value prompts' tokens that come from the prefix cache", found / asked, aim=">= 0.9", note=f"{asked:.0f} tokens"),
        row("of all prompts' tokens", found_all / asked_all),
        row("states that another response of the group has, too", 1 - len(vined["values"]) / total, note=f"of {total}"),
    ]


class NoGrader:
    def start(self, texts, golds):
        pass

    def grade(self, texts, golds):
        return [False] * len(texts)


def bench_grading(a, folder):
    """An iteration whose every rollout ends in a formula to be compared, against one without a grader."""
    w, rng = Workload(a.model, folder), random.Random(0)
    plain, times = w.engine.text, {True: [], False: []}

    def with_formula(ids):
        return plain(ids) + f" \\boxed{{\\frac{{{rng.randrange(40)}}}{{\\sqrt{{7}}}}}}"  # as many distinct answers as a hard problem has

    batch = [(dataclasses.replace(p, answer=f"\\frac{{{i}\\sqrt{{7}}}}{{7}}"), ids) for i, (p, ids) in enumerate(w.batch)]
    w.engine.text = with_formula
    for _ in range(2 * a.repeats):
        for graded in (True, False):
            w.grader.cache.clear()
            start = time.perf_counter()
            tokens = tokens_of(*w.iterate(grader=None if graded else NoGrader(), batch=batch))
            times[graded].append((time.perf_counter() - start) / tokens)
    ratio = statistics.median(times[True]) / statistics.median(times[False])
    counts = w.grader.counts
    note = f"{counts['graded']} distinct, {counts['cached']} known pairs; a core is left to the grader"
    return [row("rollouts with grading, of without", ratio, aim="<= 1.02", note=note)]


def bench_growth(a, folder):
    """Time and tokens of an iteration's rollouts against K, steps per response and responses; means of repeats that take turns."""
    w, found = Workload(a.model, folder), {}
    cases = [(f"K = {k}", dict(K=k)) for k in (1, 3, 9, 18)]
    if not a.model:
        cases += [(f"steps of {n} tokens", dict(step_credit=f"tokens:{n}")) for n in (128, 64, 32, 16)]
    cases += [(f"{n} responses per prompt", dict(responses_per_prompt=n)) for n in (2, 4, 8, 16)]
    w.iterate()
    for _ in range(a.repeats):
        for name, changes in cases:
            start = time.perf_counter()
            episodes, vined = w.iterate(**changes)
            took = time.perf_counter() - start
            found.setdefault(name, []).append((took, tokens_of(episodes, vined), len(vined["values"]), w.engine.steps))
    means = {name: [statistics.mean(column) for column in zip(*measured)] for name, measured in found.items()}
    return [
        row(name, took, "s", note=f"{tokens:.0f} tokens, {states:.0f} states, {steps:.0f} engine steps")
        for name, (took, tokens, states, steps) in means.items()
    ]


def bench_ranks(a, folder):
    """Two processes of one thread each against one; on GPUs: two GPUs against one."""
    if ON_GPU and torch.cuda.device_count() < 2:
        return []
    model = a.model or "tiny"
    speeds, idle = {1: [], 2: []}, []
    for repeat in range(a.repeats):
        for ranks in speeds:
            torchrun = f"-m torch.distributed.run --standalone --nproc_per_node={ranks}".split()
            command = [*torchrun, __file__, "--rank_of", model, str(repeat)]
            done = subprocess.run([sys.executable, *command], env=os.environ | {"OMP_NUM_THREADS": "1"}, capture_output=True, text=True)
            if done.returncode:
                raise RuntimeError(done.stderr)
            found = json.loads(done.stdout.splitlines()[-1])
            speeds[ranks].append(found["speed"])
            idle += [found["idle"]] if ranks == 2 else []
    one, two = (statistics.median(speeds[n]) for n in (1, 2))
    each = ", ".join(" and ".join(f"{share:.2f}" for share in run) for run in idle)
    return [
        row("tokens per second of two ranks, of one", two / one, aim=">= 1.7", note=f"{two:.0f} per second"),
        row("share of the time that a rank waits for the other", statistics.mean(map(statistics.mean, idle)), note=f"each: {each}"),
    ]


def one_rank(model, seed):
    """A rank of bench_ranks: three iterations of 64 responses per rank, as many as the paper's on 8 GPUs; the last two count."""
    import torch.distributed as dist

    from watch import Watch

    ppo.init_distributed()
    with Watch() as watch:
        with tempfile.TemporaryDirectory() as folder:
            if dist.get_rank() == 0:
                tiny_model(folder)
            folders = train.over_ranks([folder])  # rank 0's has the model
            w = Workload(None if model == "tiny" else model, folders[0], prompts=8)
            w.engine.seed(seed)
            dist.barrier()
        wall, busy, tokens = 0.0, 0.0, 0
        for i in range(3):
            dist.barrier()
            start = time.perf_counter()
            episodes, values = w.begin()
            sampled = time.perf_counter()
            values.spread()
            spread = time.perf_counter()
            values.wait()
            ended = time.perf_counter()
            vined = values.set_advantages(episodes)
            if i:
                wall, busy = wall + time.perf_counter() - start, busy + (sampled - start) + (ended - spread)
                tokens += tokens_of(episodes, vined)
        ranks = train.over_ranks([(1 - busy / wall, tokens)])
        if dist.get_rank() == 0:
            print(json.dumps(dict(speed=sum(n for _, n in ranks) / wall, idle=[idle for idle, _ in ranks])))
        train.shut_down(w.engine, w.grader, watch)


def bench_sync(a, folder):
    """Memory at the peak of giving the engine the trainer's weights, above both models, in layers of the model."""
    from torch.distributed.fsdp import FSDPModule

    from rollout import Engine

    device = ppo.init_distributed()
    model = a.model or tiny_model(folder, hidden_size=1024, intermediate_size=4096, num_hidden_layers=8)
    engine = Engine(model, max_sequence=512, gpu_memory=0.4)
    trainer = ppo.load_sharded(model, device)
    engine.load_weights(ppo.full_tensors(trainer))
    most, _ = peak(lambda: engine.load_weights(ppo.full_tensors(trainer)))
    size = lambda module: sum(p.numel() * 4 for p in module.parameters())
    layer, total = max(size(m) for m in trainer.modules() if isinstance(m, FSDPModule) and m is not trainer), size(trainer)
    return [
        row(
            "memory of a weight sync above both models, in layers",
            most / layer,
            aim="<= 1",
            note=f"a layer: {layer / 1e6:.0f} MB of {total / 1e6:.0f}",
        )
    ]


# --- training -----------------------------------------------------------------------------------------------------------------------


def bench_head(a, folder):
    """Log-probabilities with a vocabulary of 128k and width 1024: the chunked head against all logits at once; forward and backward."""
    vocabulary, width, tokens = 128_000, 1024, 4096
    device = ppo.init_distributed()
    torch.manual_seed(0)
    head = torch.nn.Linear(width, vocabulary, bias=False, device=device)
    hidden, targets = torch.randn(1, tokens, width, device=device, requires_grad=True), torch.randint(vocabulary, (tokens,), device=device)
    m = dict(inputs={}, positions=torch.arange(tokens, device=device), targets=targets)
    body = lambda **_: SimpleNamespace(last_hidden_state=hidden)
    model = SimpleNamespace(base_model=body, get_output_embeddings=lambda: head)
    model.through_head = MethodType(ppo.through_head, model)

    def run(logprobs):
        head.zero_grad()
        hidden.grad = None
        logprobs().mean().backward()

    chunked = lambda: run(lambda: ppo.token_logprobs(model, m, 0.6))
    plain = lambda: run(lambda: (head(hidden[0]) / 0.6).log_softmax(-1).gather(1, targets[:, None]))
    grads = []
    for work in (chunked, plain):
        work()
        grads.append((head.weight.grad.clone(), hidden.grad.clone()))
    difference = max(((x - y).norm() / y.norm()).item() for x, y in zip(*grads))
    del grads
    head.zero_grad()
    (most, _), (most_plain, _) = peak(chunked), (head.zero_grad(), peak(plain))[1]
    time_chunked, time_plain = take_turns([chunked, plain], a.repeats)
    return [
        row(
            "head's memory, of all logits at once", most / most_plain, aim="<= 0.25", note=f"{most / 1e9:.1f} of {most_plain / 1e9:.1f} GB"
        ),
        row("head's time, of all logits at once", time_chunked / time_plain, aim="<= 1.15"),
        row("largest relative difference of a gradient", difference, aim="~ 1e-6"),
    ]


def bench_update(a, folder):
    """The trainer's update against a padded one that keeps all logits (naive.py), on 32 responses of skewed lengths; head of a real size."""
    from experiments import naive

    device = ppo.init_distributed()
    model = a.model or tiny_model(folder, vocab_size=16_000, hidden_size=192, intermediate_size=576)
    rng, limit = random.Random(0), 512
    lengths = [min(limit, 1 + int(rng.expovariate(1 / 128))) for _ in range(32)]
    ids = lambda n: [rng.randrange(2, 16_000) for _ in range(n)]
    episodes = [dict(prompt_ids=ids(rng.randrange(50, 120)), response_ids=ids(n), advantages=[rng.gauss(0, 1)] * n) for n in lengths]
    real = sum(len(e["prompt_ids"]) + n for e, n in zip(episodes, lengths))
    parts = [episodes[i : i + 8] for i in range(0, 32, 8)]
    padded = sum(8 * max(len(e["prompt_ids"] + e["response_ids"]) for e in part) for part in parts)
    options = dict(learning_rate=1e-6, minibatch=16)

    def ours():
        trainer = ppo.Trainer(model, device, total_steps=4, micro_batch_tokens=4096, **options)
        return trainer, trainer.update(episodes)

    def plain():
        trainer = naive.Trainer(model, device, micro_batch=8, dtype=ppo.compute_dtype(device), **options)
        return trainer, trainer.update(episodes)

    most, (trainer, _) = peak(ours)
    most_plain, (plain_trainer, _) = peak(plain)
    works = [lambda: trainer.update(episodes), lambda: plain_trainer.update(episodes)]
    time_ours, time_plain = take_turns(works, a.repeats)
    return [
        row(
            "update's memory, of the padded one with all logits",
            most / most_plain,
            note=f"{most / 1e9:.2f} of {most_plain / 1e9:.2f} GB, models included",
        ),
        row("update's time, of the padded one with all logits", time_ours / time_plain, note=f"{time_ours:.1f} s"),
        row(
            "tokens computed that are real",
            1.0,
            aim=">= 0.9",
            note=f"nothing is padded; in rows padded to the longest of 8: {real / padded:.2f}",
        ),
    ]


def bench_iteration(a, folder):
    """One whole iteration, rollouts and update, against naive.py; one rank."""
    from experiments import naive

    w = Workload(a.model, folder, minibatch=32)
    options = dict(learning_rate=1e-6, minibatch=32)
    trainer = ppo.Trainer(w.model, w.device, total_steps=100, micro_batch_tokens=w.s.micro_batch_tokens, **options)
    plain_trainer = naive.Trainer(w.model, w.device, micro_batch=8, dtype=ppo.compute_dtype(w.device), **options)
    counted = {"ours": [], "naive": []}

    def ours():
        episodes, vined = w.iterate()
        trainer.update(episodes)
        counted["ours"].append(tokens_of(episodes, vined))

    def plain():
        w.engine.llm.reset_prefix_cache()
        episodes, tokens = naive.rollouts(w.engine, w.grader, w.batch, w.s)
        plain_trainer.update(episodes)
        counted["naive"].append(tokens)

    ours(), plain()
    memory = [peak(work)[0] for work in (ours, plain)]
    time_ours, time_plain = take_turns([ours, plain], a.repeats)
    ours, plain = (statistics.median(counted[k]) for k in ("ours", "naive"))
    return [
        row("whole iteration's time, of a plain one", time_ours / time_plain, note=f"{time_ours:.1f} of {time_plain:.1f} s"),
        row("its sampled tokens, of a plain one", ours / plain, note=f"{ours:.0f}: equal states once"),
        row(
            "its memory at the peak, of a plain one",
            memory[0] / memory[1],
            note=f"{memory[0] / 1e6:.0f} of {memory[1] / 1e6:.0f} MB above models and engine",
        ),
    ]


# --- the program --------------------------------------------------------------------------------------------------------------------

PARTS = {name.removeprefix("bench_"): work for name, work in list(globals().items()) if name.startswith("bench_")}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=PARTS, default=list(PARTS), metavar="PART", help=f"of {', '.join(PARTS)}")
    parser.add_argument("--model", help="Hugging Face folder or hub name; default: a tiny random one, made anew")
    parser.add_argument("--repeats", type=int, default=3, help="measurements of each of two things that take turns")
    parser.add_argument("--out", type=Path, help="default: experiments/results/bench-DEVICE.json; parts that are not run stay in it")
    parser.add_argument("--part", choices=PARTS, help=argparse.SUPPRESS)  # this process is the one of that part
    parser.add_argument("--rank_of", nargs=2, help=argparse.SUPPRESS)  # this process is a rank of bench_ranks: model, seed
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
    out = a.out or RESULTS / f"bench-{'gpu' if ON_GPU else 'cpu'}.json"
    found = json.loads(out.read_text()) if out.exists() else {}
    for name in a.only:
        print(f"\n{name}: {PARTS[name].__doc__}", flush=True)
        model = ["--model", a.model] if a.model else []
        command = [sys.executable, __file__, "--part", name, "--repeats", str(a.repeats), *model]
        # one core is left to the grader's worker; beside a GPU all of them are
        spare = {"OMP_NUM_THREADS": str(max(1, len(os.sched_getaffinity(0)) - 1))} if name == "grading" else {}
        done = subprocess.run(command, env=os.environ | spare, capture_output=True, text=True)
        if done.returncode:
            sys.exit(f"bench.py: {name} failed\n{done.stderr}")
        rows = json.loads(done.stdout.splitlines()[-1])
        for r in rows:
            print(f"  {r['what']:58}{r['value']:10.3g} {r['unit']:3}{r['aim']:8}  {r['note']}", flush=True)
        found[name] = dict(device=device, model=a.model or "tiny", repeats=a.repeats, rows=rows)
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
