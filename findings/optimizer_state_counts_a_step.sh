#!/usr/bin/env bash
# torch 2.13.0: saving the state of an Adam that has made no step yet makes one, and the first real step is 26 % smaller.
#
# torch.distributed.checkpoint.state_dict.get_optimizer_state_dict calls optimizer.step() with gradients of zero to
# have a state to return. Adam counts it: its bias correction is that of the second step from then on, in the running
# optimizer, too.
#
# Exit code 0: seen as described; 1: the behaviour has changed.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q torch==2.13.0 numpy
"$folder/venv/bin/python" - <<'PYTHON'
import sys
import torch
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict


def first_step(saved):
    """How far the first step with a gradient of 1 moves a weight, in learning rates."""
    model = torch.nn.Linear(1, 1, bias=False)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.0)
    counted = None
    if saved:
        state = get_optimizer_state_dict(model, optimizer)["state"]
        counted = state["weight"]["step"].item()
    before = model.weight.item()
    model.weight.grad = torch.ones_like(model.weight)
    optimizer.step()
    return (before - model.weight.item()) / 1e-3, counted


(plain, _), (after, counted) = first_step(False), first_step(True)
print("torch", torch.__version__)
print("steps in the saved state of an optimizer that has made none:", counted)
print(f"first step: {plain:.3f} learning rates, after saving: {after:.3f}")
sys.exit(not (counted == 1 and abs(plain - 1) < 0.01 and abs(after - 0.744) < 0.01))
PYTHON
