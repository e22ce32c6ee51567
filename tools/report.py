"""Send a run's metrics to TensorBoard or Weights & Biases, while it runs or afterwards.

    python tools/report.py runs/math --to tensorboard
    python tools/report.py runs/math --to wandb --follow     # as long as the run goes on

It reads metrics.jsonl, so the training loop knows nothing of it, and a run that was resumed has one curve.
Each start sends the whole file again, to the same place.
"""

import argparse
import json
import sys
import time
from pathlib import Path


def lines_of(run, follow=False, seconds=5.0):
    """The lines of a run's metrics.jsonl; follow: new ones too, until the run has written its final model."""
    position = 0
    while True:
        ended = not follow or (run / "model").exists()
        content = (run / "metrics.jsonl").read_bytes()
        if len(content) < position:
            sys.exit("report.py: the run was resumed from an earlier checkpoint: start report.py again")
        text = content[position:]
        whole = text[: text.rfind(b"\n") + 1]  # the last line can still be half written
        position += len(whole)
        yield from map(json.loads, whole.splitlines())
        if ended:
            return
        time.sleep(seconds)


def to_tensorboard(run, lines):
    from torch.utils.tensorboard import SummaryWriter

    for file in run.glob("events.out.tfevents*"):
        file.unlink()  # an earlier start's
    with SummaryWriter(run) as writer:
        for line in lines:
            for name, value in line.items():
                if value is not None:
                    writer.add_scalar(name, value, line["iteration"])
            writer.flush()


def to_wandb(run, lines):
    import wandb

    known = run / "wandb_id"  # of an earlier start: the same place
    if not known.exists():
        known.write_text(wandb.util.generate_id())
    settings = json.loads((run / "settings.json").read_text())
    place = wandb.init(
        project="vineppo", name=run.name, id=known.read_text(), resume="allow", config=settings
    )
    for line in lines:
        if line["iteration"] >= place.step:  # wandb takes no step twice
            place.log(line, step=line["iteration"])
    place.finish()


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("run", type=Path, help="folder of the run")
    parser.add_argument("--to", choices=["tensorboard", "wandb"], required=True)
    parser.add_argument("--follow", action="store_true", help="go on until the run has ended")
    arguments = parser.parse_args()
    if not (arguments.run / "metrics.jsonl").exists():
        sys.exit(f"report.py: {arguments.run} holds no metrics.jsonl: name the folder of a run")
    send = {"tensorboard": to_tensorboard, "wandb": to_wandb}[arguments.to]
    try:
        send(arguments.run, lines_of(arguments.run, arguments.follow))
    except ImportError as error:
        sys.exit(f"report.py: --to {arguments.to} needs a package that is not installed ({error})")


if __name__ == "__main__":
    main()
