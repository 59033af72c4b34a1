"""CIFAR-10 small enough for a CPU: images of 16x16 pixels, fewer of them, as a file for ``--dataset npz``.

    python docs/experiments/small_cifar.py --data-dir DIR --out cifar10-16x16.npz
    sadp-fast study accuracy --dataset npz --data-dir cifar10-16x16.npz --model mlp ...

Each pixel is the mean of four. Training images are the data set's first, test images all of them.
"""

import argparse
from pathlib import Path

import numpy as np
from torch import Tensor
from torch.nn.functional import avg_pool2d

from sadp_fast.lab.data import Dataset, load


def arrays(data: Dataset, examples: int) -> dict[str, np.ndarray]:
    """What the file holds: images uint8 [N, H / 2, W / 2, C] and labels int64 [N]."""

    def halved(images: Tensor) -> np.ndarray:
        return avg_pool2d(images.float(), 2).round().byte().permute(0, 2, 3, 1).contiguous().numpy()

    return {
        "train_x": halved(data.train_images[:examples]),
        "train_y": data.train_labels[:examples].numpy(),
        "test_x": halved(data.test_images),
        "test_y": data.test_labels.numpy(),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data-dir", type=Path, required=True, help="CIFAR-10's folder or file")
    parser.add_argument("--out", type=Path, required=True, help="the file to write")
    parser.add_argument("--examples", type=int, default=20_000, help="training images (default: 20,000)")
    args = parser.parse_args()
    if args.out.exists():
        parser.error(f"--out {args.out} exists; name another file")
    content = arrays(load("cifar10", args.data_dir), args.examples)
    with args.out.open("xb") as file:  # by its name alone, NumPy would write OUT.npz, whatever is there
        np.savez_compressed(file, **content)


if __name__ == "__main__":
    main()
