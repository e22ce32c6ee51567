"""Draw runs' curves over their iterations: accuracy, reward, KL, entropy, lengths, and where the time went.

    python experiments/plot.py runs/demo                           # writes runs/demo/curves.png
    python experiments/plot.py runs/a runs/b --out both.png        # overlaid, labelled by what differs in their settings

It reads what train.py wrote: settings.json and metrics.jsonl.
"""

import argparse
import json
import sys
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

COLOURS = ["#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#000000"]  # Okabe and Ito: told apart by the colour-blind
LINES = ["-", "--", ":", "-."]
NOT_A_DIFFERENCE = ("run_dir", "resume", "report_to")


def read(run):
    try:
        lines = [
            json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines() if line.endswith("}")
        ]  # the last may be cut short
        return json.loads((run / "settings.json").read_text()), lines
    except (OSError, ValueError) as error:
        sys.exit(f"plot.py: {run} is no run folder of train.py (settings.json, metrics.jsonl): {error}")


def labels(settings):
    """What differs in the runs' settings, as a label for each; the folder's name for runs that do not differ."""
    names = sorted({name for s in settings for name in s if name not in NOT_A_DIFFERENCE})
    different = [name for name in names if len({json.dumps(s.get(name)) for s in settings}) > 1]
    return [", ".join(f"{name} {s[name]}" for name in different if s.get(name) is not None) or Path(s["run_dir"]).name for s in settings]


def smooth(values, window):
    return [sum(values[max(0, i + 1 - window) : i + 1]) / len(values[max(0, i + 1 - window) : i + 1]) for i in range(len(values))]


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="folders that train.py wrote")
    parser.add_argument("--out", type=Path, help="the picture; default curves.png in the first folder")
    arguments = parser.parse_args()
    runs = [read(run) for run in arguments.runs]
    texts = labels([settings for settings, _ in runs])
    figure, axes = plt.subplots(2, 3, figsize=(13, 7), layout="constrained")
    accuracy, reward, kl, entropy, length, seconds = axes.flat
    for number, ((settings, lines), text) in enumerate(zip(runs, texts)):
        style = dict(color=COLOURS[number % len(COLOURS)], linestyle=LINES[number // len(COLOURS) % len(LINES)])
        trained = [line for line in lines if line["iteration"] > 0]
        window = max(1, len(trained) // 20)

        def curve(axis, name, scale=1.0, marker=None, text=text, style=style, window=window, lines=lines):
            points = [(line["iteration"], line[name] * scale) for line in lines if name in line]
            if points:
                x, y = zip(*points)
                axis.plot(x, y if marker else smooth(y, window), marker=marker, markersize=4, label=text, **style)

        curve(accuracy, "accuracy", marker="o")
        curve(reward, "reward")
        curve(kl, "kl")
        curve(entropy, "entropy")
        responses = (settings.get("prompts_per_iteration") or settings.get("problems_per_round") or 1) * settings.get(
            "responses_per_prompt", 1
        )
        curve(length, "tokens_sample", 1 / responses)
        below = [0.0] * len(trained)
        for phase, shade in (("sample", 0.25), ("values", 0.5), ("train", 0.75), ("sync", 1.0)):
            spent = smooth([line.get(f"seconds_{phase}", 0.0) for line in trained], window)
            above = [a + b for a, b in zip(below, spent)]
            if len(runs) == 1:
                seconds.fill_between([line["iteration"] for line in trained], below, above, label=phase, color=style["color"], alpha=shade)
            below = above
        if len(runs) > 1:
            seconds.plot([line["iteration"] for line in trained], below, label=text, **style)
    panels = {
        accuracy: "held-out accuracy",
        reward: "training reward",
        kl: "KL to the initial policy, nats per response",
        entropy: "entropy, nats per token",
        length: "tokens per response",
        seconds: "seconds per iteration" + (", by phase" if len(runs) == 1 else ", all phases"),
    }
    for axis, title in panels.items():
        axis.set_title(title, fontsize=10)
        axis.set_xlabel("iteration")
        axis.grid(alpha=0.3)
    seconds.set_ylim(bottom=0)
    if len(runs) == 1:
        seconds.legend(loc="lower right")
        figure.suptitle(f"{runs[0][0].get('algorithm', '')} on {Path(runs[0][0]['dataset']).name}")
    else:
        figure.legend(*seconds.get_legend_handles_labels(), loc="outside lower center", ncols=2, frameon=False)
    out = arguments.out or arguments.runs[0] / "curves.png"
    figure.savefig(out, dpi=110)
    print(f"wrote {out}" + "".join(f"\n  {run}: {text}" for run, text in zip(arguments.runs, texts)))


if __name__ == "__main__":
    main()
