"""Draw the curves of runs: accuracy, reward, KL, entropy, lengths, and how the time was spent.

    python tools/plot.py runs/demo                       # writes runs/demo/curves.png
    python tools/plot.py runs/a runs/b --out both.png    # overlaid, labelled by what differs

It reads what train.py wrote: settings.json and metrics.jsonl.
"""

import argparse
import json
import sys
from dataclasses import dataclass
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

# Okabe and Ito's colours, which colour-blind readers can tell apart
COLOURS = ["#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#000000"]
LINES = ["-", "--", ":", "-."]
# phases of an iteration, and their shades
PHASES = {"sample": 0.25, "values": 0.5, "train": 0.75, "sync": 1.0}


@dataclass
class Run:
    """A run: its settings, the lines of its metrics.jsonl, and its label and line style in the picture."""

    settings: dict
    lines: list[dict]
    label: str = ""
    style: dict | None = None

    @property
    def trained(self):
        """The lines of the iterations."""
        return [line for line in self.lines if line["iteration"] > 0]

    def smooth(self, values):
        """Each value replaced by the mean over a twentieth of the run, which ends with the value."""
        window = max(1, len(self.trained) // 20)
        windows = [values[max(0, i + 1 - window) : i + 1] for i in range(len(values))]
        return [sum(w) / len(w) for w in windows]

    def responses(self):
        """The number of responses in an iteration, or in a round of a baseline."""
        s = self.settings
        problems = s.get("prompts_per_iteration") or s.get("problems_per_round") or 1
        return problems * s.get("responses_per_prompt", 1)


def read(folder):
    """The Run in a folder. Exits if there is none."""
    try:
        text = (folder / "metrics.jsonl").read_text()
        lines = text[: text.rfind("\n") + 1].splitlines()  # a kill may have cut the last line short
        return Run(json.loads((folder / "settings.json").read_text()), [json.loads(line) for line in lines])
    except (OSError, ValueError) as error:
        sys.exit(f"plot.py: {folder} is no run folder of train.py (settings.json, metrics.jsonl): {error}")


def labels(settings):
    """For each run the settings that differ between the runs, as a label; the folder's name if none differ.

    Only settings that all runs have count, since older runs had others.
    """
    names = sorted(set.intersection(*map(set, settings)) - {"run_dir"})
    different = [name for name in names if len({json.dumps(s[name]) for s in settings}) > 1]
    found = []
    for s in settings:
        words = ", ".join(f"{name} {s[name]}" for name in different if s[name] is not None)
        found.append(words or Path(s["run_dir"]).name)
    return found


def curve(axis, run, name, scale=1.0, marker=None):
    """Draw one metric of a run; it is smoothed unless its points have a marker."""
    points = [(line["iteration"], line[name] * scale) for line in run.lines if name in line]
    if points:
        x, y = zip(*points)
        y = y if marker else run.smooth(y)
        axis.plot(x, y, marker=marker, markersize=4, label=run.label, **run.style)


def time_of_phases(axis, run, alone):
    """Draw the seconds of an iteration: by phase if the run is alone in the picture, else their sum."""
    iterations, below = [line["iteration"] for line in run.trained], [0.0] * len(run.trained)
    for phase, shade in PHASES.items():
        spent = run.smooth([line.get(f"seconds_{phase}", 0.0) for line in run.trained])
        above = [a + b for a, b in zip(below, spent)]
        if alone:
            fill = dict(label=phase, color=run.style["color"], alpha=shade)
            axis.fill_between(iterations, below, above, **fill)
        below = above
    if not alone:
        axis.plot(iterations, below, label=run.label, **run.style)


def picture(runs):
    """The figure with the curves of the runs."""
    figure, axes = plt.subplots(2, 3, figsize=(13, 7), layout="constrained")
    accuracy, reward, kl, entropy, length, seconds = axes.flat
    alone = len(runs) == 1
    for run in runs:
        curve(accuracy, run, "accuracy", marker="o")
        curve(reward, run, "reward")
        curve(kl, run, "kl")
        curve(entropy, run, "entropy")
        curve(length, run, "tokens_sample", 1 / run.responses())
        time_of_phases(seconds, run, alone)
    panels = {
        accuracy: "held-out accuracy",
        reward: "training reward",
        kl: "KL to the initial policy, nats per response",
        entropy: "entropy, nats per token",
        length: "tokens per response",
        seconds: "seconds per iteration" + (", by phase" if alone else ", all phases"),
    }
    for axis, title in panels.items():
        axis.set_title(title, fontsize=10)
        axis.set_xlabel("iteration")
        axis.grid(alpha=0.3)
    seconds.set_ylim(bottom=0)
    if alone:
        s = runs[0].settings
        seconds.legend(loc="lower right")
        figure.suptitle(f"{s.get('algorithm', '')} on {Path(s['dataset']).name}")
    else:
        legend = dict(loc="outside lower center", ncols=2, frameon=False)
        figure.legend(*seconds.get_legend_handles_labels(), **legend)
    return figure


def main():
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="folders that train.py wrote")
    parser.add_argument("--out", type=Path, help="the picture; default: curves.png in the first folder")
    a = parser.parse_args()
    runs = [read(folder) for folder in a.runs]
    for i, (run, label) in enumerate(zip(runs, labels([run.settings for run in runs]))):
        line = LINES[i // len(COLOURS) % len(LINES)]
        run.label, run.style = label, dict(color=COLOURS[i % len(COLOURS)], linestyle=line)
    out = a.out or a.runs[0] / "curves.png"
    picture(runs).savefig(out, dpi=110)
    print(f"wrote {out}")
    for folder, run in zip(a.runs, runs):
        accuracies = [line["accuracy"] for line in run.lines if "accuracy" in line]
        reached = f"accuracy {accuracies[0]:.3f} before, {accuracies[-1]:.3f} after; " if accuracies else ""
        print(f"  {folder}: {reached}{run.label}")


if __name__ == "__main__":
    main()
