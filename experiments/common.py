"""What these programs share: a parser, results in .jsonl files, errors, colours, tables, checkpoints to measure.

A program begins with these lines, since this module must be imported before torch:

    sys.path.insert(0, str(Path(__file__).parent.parent))
    from experiments import common
"""

import support.startup  # noqa: F401 (before torch is imported)

# isort: split
import argparse
import fcntl
import json
import math
import os
import statistics
import sys
from dataclasses import asdict, fields, replace
from pathlib import Path

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "experiments" / "results"

# Okabe and Ito's colours, which colour-blind readers can tell apart
BLUE, SKY, GREEN, ORANGE, VERMILION = "#0072b2", "#56b4e9", "#009e73", "#e69f00", "#d55e00"
PURPLE, BLACK, GREY = "#cc79a7", "#000000", "#999999"

# Student's t, two-sided 95 %, by the number of values
T95 = {2: 12.71, 3: 4.303, 4: 3.182, 5: 2.776, 6: 2.571, 7: 2.447, 8: 2.365}


def parser(doc):
    """An argparse parser whose help begins with a program's docstring."""
    raw = argparse.RawDescriptionHelpFormatter
    return argparse.ArgumentParser(description=doc, formatter_class=raw, allow_abbrev=False)


# --- results: .jsonl files, one line per run, round or checkpoint ---


def append(path, result):
    """Append a result to a .jsonl file as one whole line.

    Other processes may append to the file at the same time. A last line that a killed process left
    unfinished is replaced.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "a+b") as file:
        fcntl.flock(file, fcntl.LOCK_EX)  # until the file is closed
        file.seek(0)
        file.truncate(file.read().rfind(b"\n") + 1)
        file.write(json.dumps(result, separators=(",", ":")).encode() + b"\n")
        file.flush()
        os.fsync(file.fileno())


def read(path):
    """The results in a .jsonl file, oldest first, without a last line that is unfinished. [] if there is no file."""
    text = path.read_text() if path.exists() else ""
    return [json.loads(line) for line in text[: text.rfind("\n") + 1].splitlines()]


def newest(path):
    """{name: result}, sorted by name. Of several results with one name the newest counts."""
    found = {result["name"]: result for result in read(path)}
    return dict(sorted(found.items()))


def columns_of(rows):
    """{name: its value in each row} of rows [{name: value}]; None where a row lacks it. Values may be dicts again."""
    columns = {}
    for name in dict.fromkeys(name for row in rows for name in row):
        values = [row.get(name) for row in rows]
        if any(isinstance(value, dict) for value in values):
            values = columns_of([value or {} for value in values])
        if values:
            columns[name] = values
    return columns


def rows_of(columns):
    """The rows that columns_of was given, except for None and for a dict that is empty in every row."""
    flat = {name: rows_of(values) if isinstance(values, dict) else values for name, values in columns.items()}
    rows = [dict(zip(flat, values)) for values in zip(*flat.values())]
    return [{name: value for name, value in row.items() if value is not None} for row in rows]


def rounded(x):
    """A result with its floats rounded to five digits."""
    if isinstance(x, dict):
        return {name: rounded(value) for name, value in x.items()}
    if isinstance(x, list):
        return [rounded(value) for value in x]
    return float(f"{x:.5g}") if isinstance(x, float) else x


# --- numbers and tables ---


def mean_and_error(values):
    """(mean, its standard error); the error of a single value is 0."""
    error = statistics.stdev(values) / math.sqrt(len(values)) if len(values) > 1 else 0.0
    return statistics.mean(values), error


def interval(values):
    """(mean, half the width of its 95 % t interval); the width of a single value is 0."""
    mean, error = mean_and_error(values)
    return mean, T95[len(values)] * error if error else 0.0


def plus_minus(mean, error, digits, sign=""):
    """sign: "+" to write the sign of a positive mean, too."""
    return f"{mean:{sign}.{digits}f} ± {error:.{digits}f}"


def table(head, rows):
    """The lines of a Markdown table."""
    lines = [f"| {' | '.join(map(str, cells))} |" for cells in (head, *rows)]
    return [lines[0], "|---" * len(head) + "|", *lines[1:]]


def write_page(path, lines):
    """Write lines to a Markdown file and print them."""
    text = "\n".join(lines).rstrip("\n") + "\n"
    path.write_text(text)
    print(text, end="")


def pyplot():
    """matplotlib.pyplot, for pictures that are written to files."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot

    return matplotlib.pyplot


# --- checkpoints to measure (values.py, gradients.py) ---
# torch, vLLM and the core are imported where they are used: drawing needs none of them


class Checkpoint:
    """RUN/checkpoints/N of train.py, or RUN, which stands for the policy that the run began from.

    s: the train.Settings of the run. model: the folder of the policy. read_problems and load set the rest.
    """

    def __init__(self, path):
        """Read the settings. Raises ValueError if they, or the model, are missing."""
        import train

        self.path, of_run = path, path.parent.name == "checkpoints"
        self.name = f"{path.parent.parent.name}-{path.name}" if of_run else f"{path.name}-0"
        run = path if (path / "settings.json").is_file() else path.parent.parent
        try:
            stored = json.loads((run / "settings.json").read_text())
        except OSError:
            raise ValueError(f"{path} is neither a RUN of train.py nor its RUN/checkpoints/N") from None
        known = {f.name for f in fields(train.Settings)}  # older runs had settings that are gone
        self.s = train.Settings(**{name: value for name, value in stored.items() if name in known})
        self.model = path if (path / "config.json").is_file() else Path(self.s.model)
        if not (self.model / "config.json").is_file():
            raise ValueError(f"{path}: there is no model in {self.model}")

    def read_problems(self, needed):
        """Set training and test, the encoded problems. Raises ValueError for fewer than `needed` test problems."""
        import data
        from support.pretrained import read_tokenizer
        from support.run_folder import first_day

        s, tokenizer = self.s, read_tokenizer(self.model)
        day = first_day(Path(s.run_dir))
        options = s.max_sequence - s.max_tokens, s.chat, s.chat_options, day
        self.training, self.test = (data.encode(p, tokenizer, *options)[0] for p in data.load_for(s))
        if len(self.test) < needed:
            raise ValueError(
                f"--problems and --ranked together need {needed} test problems; {s.dataset} has {len(self.test)}"
            )

    def load(self, arguments, device, engine, grader):
        """Load the policy and, of a PPO run, the critic; give the engine the policy's weights. All ranks call it."""
        import torch.distributed as dist

        from baselines.critic import Critic
        from model import full_tensors, load_sharded

        self.arguments, self.device, self.engine, self.grader = arguments, device, engine, grader
        self.critic = None
        engine.sleep()
        self.policy = load_sharded(self.model, device, bfloat16=self.s.bfloat16)
        if (self.model / "state" / "critic").is_dir():
            self.critic = Critic(replace(self.s, model=str(self.model)), device)
            self.critic.load(self.model / "state")
        elif self.s.algorithm == "ppo" and dist.get_rank() == 0:
            print(f"{self.path} has no state/critic, so its value network is left out", flush=True)
        engine.load_weights(full_tensors(self.policy))
        engine.seed(arguments.seed)

    def solutions(self, problems, n, **changes):
        """n solutions of each problem, as Episodes with rewards and boundaries. changes: of the settings."""
        from rollout import episodes_for, sample
        from steps import step_boundaries

        episodes = episodes_for(problems, n)
        sample(self.engine, self.grader, episodes, replace(self.s, **changes))
        for e in episodes:
            e.boundaries = step_boundaries("paper", e.text, e.response_ids, self.engine.decode)
        return episodes

    def roll_out(self, states, n, **changes):
        """Sample n rollouts from each state, without rewards. changes: of the settings."""
        s = replace(self.s, **changes)
        for state in states:
            self.engine.submit(state, n, s.max_tokens - len(state.prefix_ids), s.temperature, s.top_p)
        while self.engine.running:
            for state, completions in self.engine.step():
                state.receive(completions)

    def rewards_from(self, states, n, **changes):
        """The rewards of n rollouts from each state: a list of n per state."""
        self.roll_out(states, n, **changes)
        self.grader.set_rewards(states)
        return [[rollout.reward for rollout in state.rollouts] for state in states]


def read_checkpoints(paths):
    """The Checkpoints at these paths. Raises ValueError where one cannot be measured, or not with the others."""
    checkpoints = [Checkpoint(path) for path in paths]
    if not checkpoints:
        raise ValueError("name RUN/checkpoints/N folders of train.py")
    engines = {(c.s.dataset, c.s.stop, c.s.max_sequence, c.s.chat) for c in checkpoints}
    if len(engines) > 1:
        raise ValueError(
            "the runs differ in dataset, stop, max_sequence or chat: measure them one by one, with the same --results"
        )
    return checkpoints


def checkpoint_parser(doc, results):
    """parser, with what both programs take."""
    made = parser(doc)
    add = made.add_argument
    folders = "RUN/checkpoints/N folders that train.py wrote, or RUN for the policy that it began from"
    add("checkpoints", nargs="*", type=Path, metavar="CHECKPOINT", help=folders)
    add("--seed", type=int, default=0, help="seed of the sampling")
    beside = "the .jsonl file of the results; pictures and tables are written beside it"
    add("--results", type=Path, default=results, metavar="FILE", help=beside)
    add("--draw", action="store_true", help="only draw pictures and tables from the results")
    return made


def measure_checkpoints(program, a, check, measure, draw, needed=0):
    """What both programs do with their arguments a: draw(a.results), after measuring, unless --draw is given.

    check(a) raises ValueError for arguments that cannot work. measure(checkpoint), called on all ranks,
    returns ({what else is said of the measurement}, {what was found}). needed: test problems.
    """
    if a.draw:
        return draw(a.results)
    import model  # noqa: F401 (check_supported needs its attention)
    from support.ranks import check_gpus, exit_all, init_distributed, refuse
    from support.supported import check_supported

    try:
        check_gpus()
        checkpoints = read_checkpoints(a.checkpoints)
        check(a)
        for folder in {str(checkpoint.model) for checkpoint in checkpoints}:
            check_supported(folder)
        for checkpoint in checkpoints:
            checkpoint.read_problems(needed)
    except (ValueError, OSError) as error:
        refuse(f"{program}: {error}")
    _measure_each(a, checkpoints, measure, init_distributed())
    if os.environ["RANK"] == "0":
        draw(a.results)
    exit_all()


def _measure_each(a, checkpoints, measure, device):
    """Append the results of each checkpoint to a.results. All ranks call it."""
    from grader import Grader
    from rollout import Engine, shut_down
    from support.watch import Watch

    numbers = {name: value for name, value in vars(a).items() if isinstance(value, int | float)}
    with Watch() as watch:
        first = checkpoints[0]
        engine = Engine(replace(first.s, model=str(first.model), tensor_parallel_size=1), watch)
        grader = Grader()
        for c in checkpoints:
            c.load(a, device, engine, grader)
            more, found = measure(c)
            if watch.rank == 0:
                measured = dict(checkpoint=str(c.path)) | numbers | more
                about = dict(name=c.name, measured=measured, settings=asdict(c.s))
                append(a.results, rounded(about | found))
                print(f"{c.name} is measured", flush=True)
        shut_down(engine, grader)


def results_to_draw(program, path):
    """{name: result} of newest; exits if there is none."""
    results = newest(path)
    if not results:
        sys.exit(f"{program}: there are no results in {path}: name checkpoints to measure")
    return results
