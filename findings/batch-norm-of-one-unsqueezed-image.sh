#!/usr/bin/env bash
# PyTorch 2.13.0 on a CPU: the gradients of nn.BatchNorm2d are wrong, without a word, for a batch of one image
# that was laid out channels last and given its batch dimension by unsqueeze(0) - as an image of an array [H, W, C] is.
# The forward pass is right. The same numbers in a batch of one in any other layout, or copied, have right gradients.
#
# Guessed before it was run: a difference in the last bits. Seen: gradients that have nothing to do with the right ones.
# Touches users of sadp_fast: see docs/neurons.md; the layer's path on the CPU gives such a batch its usual strides first.
#
# Fails where the behaviour has changed.
set -euo pipefail
work="$(mktemp -d)"
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet torch==2.13.0 numpy==2.4.6

"$work/venv/bin/python" - <<'PYTHON'
import torch
from torch import nn

torch.manual_seed(0)
image = torch.randn(4, 5, 3).permute(2, 0, 1)  # an array [H, W, C] as [C, H, W]


def gradients(x, dtype=torch.float32, training=True):
    x, norm = x.detach().to(dtype).requires_grad_(), nn.BatchNorm2d(3).to(dtype).train(training)
    out = norm(x)
    (out * torch.arange(out.numel(), dtype=dtype).sin().view(out.shape)).sum().backward()
    return out.detach(), x.grad, norm.weight.grad, norm.bias.grad


def error(found):
    return [f"{(a.double() - b).abs().max().item():.1e}" for a, b in zip(found, exact)]


one = image.unsqueeze(0)
exact = gradients(one.contiguous(), torch.float64)
print("torch", torch.__version__)
names = "error of output, gradients of input, weight, bias:"
for name, x in (
    ("image.unsqueeze(0)", one),
    ("the same, contiguous", one.contiguous()),
    ("the same, channels_last", one.clone(memory_format=torch.channels_last)),
):
    print(f"{name:24} strides {str(x.stride()):17} {names} {' '.join(error(gradients(x)))}")

wrong, right = gradients(one), gradients(one.contiguous())
assert torch.allclose(wrong[0].double(), exact[0], atol=1e-5), "the forward pass is wrong, too"
assert torch.allclose(right[1].double(), exact[1], atol=1e-5)
assert not torch.allclose(wrong[1].double(), exact[1], atol=0.1), "CHANGED: the gradient is right now"
frozen = gradients(one, training=False)[1].double(), gradients(one.contiguous(), torch.float64, False)[1]
assert not torch.allclose(*frozen, atol=0.1), "CHANGED: the gradient is right in evaluation"
print("in evaluation, error of the gradient of the input:", f"{(frozen[0] - frozen[1]).abs().max().item():.1e}")
print("still so: wrong gradients for image.unsqueeze(0)")
PYTHON
