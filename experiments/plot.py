"""Draw a run's learning curve: held-out accuracy and training reward over iterations.

    python experiments/plot.py runs/demo            # writes runs/demo/curve.png

It reads what train.py wrote: settings.json and metrics.jsonl.
"""

import json
import sys
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt


def main():
    if len(sys.argv) != 2 or not (Path(sys.argv[1]) / "metrics.jsonl").is_file():
        sys.exit(f"usage: python experiments/plot.py RUN, a folder that train.py wrote (with a metrics.jsonl); got {sys.argv[1:]}")
    run = Path(sys.argv[1])
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    settings = json.loads((run / "settings.json").read_text())
    figure, axes = plt.subplots(figsize=(6, 3.6), layout="constrained")
    for name, label, style in (
        ("reward", "training reward", dict(color="#999999", linewidth=1)),
        ("accuracy", f"held-out accuracy (temperature {settings['eval_temperature']})", dict(color="#0072b2", linewidth=2, marker="o")),
    ):
        points = [(line["iteration"], line[name]) for line in lines if name in line]
        axes.plot(*zip(*points), label=label, **style)
    axes.set(
        xlabel="iteration",
        ylabel="share of right answers",
        ylim=(0, 1),
        title=f"VinePPO on {Path(settings['dataset']).name}, K = {settings['K']}",
    )
    axes.grid(alpha=0.3)
    axes.legend(loc="lower right")
    figure.savefig(run / "curve.png", dpi=150)
    print(f"wrote {run / 'curve.png'}")


if __name__ == "__main__":
    main()
