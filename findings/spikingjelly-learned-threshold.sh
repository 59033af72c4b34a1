#!/usr/bin/env bash
# SpikingJelly 2.0.0: a learned threshold (node.v_threshold = nn.Parameter(...)) is accepted and never learns in float32:
# its gradient is None after backward(), without a word. In float64 and in bfloat16 the same lines give a gradient.
#
# Guessed before it was run: that the dtype decides nothing. Touches users of sadp_fast: our neurons refuse a tensor as
# v_threshold (docs/neurons.md); a network that was trained so in float32 has had constant thresholds.
#
# Fails where the behaviour has changed.
set -euo pipefail
work="$(mktemp -d)"
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet torch==2.13.0 numpy==2.4.6 loguru==0.7.3
"$work/venv/bin/pip" install --quiet --no-deps spikingjelly==2.0.0

"$work/venv/bin/python" -W ignore - <<'PYTHON'
from importlib.metadata import version

import torch
from spikingjelly.activation_based import neuron
from torch import nn

print("spikingjelly", version("spikingjelly"), "torch", torch.__version__)
learns = {}
for dtype in (torch.float32, torch.float64, torch.bfloat16):
    torch.manual_seed(0)
    node = neuron.LIFNode(step_mode="m")
    node.v_threshold = nn.Parameter(torch.tensor(1.0, dtype=dtype))
    x = (3 * torch.rand(4, 2, 3)).to(dtype).requires_grad_()
    node(x).sum().backward()
    learns[dtype] = node.v_threshold.grad is not None
    print(f"{dtype}: gradient of the threshold {node.v_threshold.grad}")
assert learns == {torch.float32: False, torch.float64: True, torch.bfloat16: True}, "CHANGED"
print("still so: no gradient in float32")
PYTHON
