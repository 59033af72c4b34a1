"""What limits the kernels, by Nsight Compute's counters: LIF, and BatchNorm + LIF, forward and backward.

python benchmarks/ncu.py FILE.json              on a GPU, with ncu in PATH and permission to read counters
python benchmarks/ncu.py FILE.json --csv FILE   from what `ncu --csv --page raw` has printed of this file's kernels
"""

from __future__ import annotations

import argparse
import csv
import json
import subprocess
import sys
from pathlib import Path

import torch

KERNELS = "lif_forward_kernel|lif_backward_kernel|norm_backward_kernel|norm_forward_kernel"
SMALL, LARGE = (16, 128, 512), (8, 32, 128, 28, 28)
LONG, LONGEST = (64, 128, 2048), (1024, 128, 128)  # as in test_long_sequences.py
LIF = tuple((shape, dtype) for shape in (SMALL, LARGE, LONG, LONGEST) for dtype in (torch.float32, torch.bfloat16))
BATCH_NORM_LIF = ((4, 128, 64, 32, 32), (4, 128, 512, 4, 4))
METRICS = {
    "time": "gpu__time_duration.sum",
    "DRAM throughput": "dram__throughput.avg.pct_of_peak_sustained_elapsed",
    "DRAM read": "dram__bytes_read.sum",
    "DRAM written": "dram__bytes_write.sum",
    "L2 hit rate": "lts__t_sector_hit_rate.pct",
    "achieved occupancy": "sm__warps_active.avg.pct_of_peak_sustained_active",
    "issue slots used": "smsp__issue_active.avg.pct_of_peak_sustained_active",
    "registers": "launch__registers_per_thread",
    "programs": "launch__grid_size",
    "threads of a program": "launch__block_size",
}
STALLS = ("long_scoreboard", "short_scoreboard", "lg_throttle", "wait", "not_selected", "math_pipe_throttle")
STALLS += ("mio_throttle", "dispatch_stall", "drain")
METRICS |= {f"stalled: {name}": f"smsp__average_warps_issue_stalled_{name}_per_issue_active.ratio" for name in STALLS}


def cases() -> list[tuple[str, tuple[int, ...], torch.dtype]]:
    """(layer, shape of its input, dtype) in the order in which they run; LIF has two kernels, BatchNormLIF three."""
    lif = [("LIFNode with statistics", *case) for case in LIF]
    return lif + [("BatchNormLIF with statistics", shape, torch.bfloat16) for shape in BATCH_NORM_LIF]


def kernels() -> list[str]:
    """A name for each launch that the counters are read of; the channel statistics of BatchNormLIF are left out."""
    passes = {"L": ("forward", "backward"), "B": ("forward", "backward, sums", "backward, gradient")}
    return [
        f"{layer}, {'x'.join(map(str, shape))} {str(dtype).removeprefix('torch.')}: {which}"
        for layer, shape, dtype in cases()
        for which in passes[layer[0]]
    ]


def run() -> None:
    """Every case once, between the marks that ncu looks for; the channels of BatchNormLIF's input lie last."""
    import sadp_fast

    calls = []
    for layer, shape, dtype in cases():
        x, gradient = (torch.randn(shape, device="cuda", dtype=dtype).add_(1) for _ in range(2))
        if layer.startswith("LIF"):
            node = sadp_fast.LIFNode(step_mode="m")
        else:
            node = sadp_fast.BatchNormLIF(shape[2]).cuda()
            x, gradient = (
                t.flatten(0, 1).contiguous(memory_format=torch.channels_last).unflatten(0, shape[:2])
                for t in (x, gradient)
            )
        node.collect_statistics = True
        calls.append((node, x.requires_grad_(), gradient))

    def once() -> None:
        for node, x, gradient in calls:
            node.reset()
            torch.autograd.grad(node(x), x, gradient)
        torch.cuda.synchronize()

    once()
    torch.cuda.cudart().cudaProfilerStart()
    once()
    torch.cuda.cudart().cudaProfilerStop()


def counted() -> str:
    """ncu's CSV of `run`, in a process of its own."""
    command = ["ncu", "--profile-from-start", "off", "--clock-control", "none", "--kernel-name", f"regex:{KERNELS}"]
    command += ["--metrics", ",".join(METRICS.values()), "--csv", "--page", "raw", sys.executable, __file__, "--run"]
    done = subprocess.run(command, capture_output=True, text=True)
    if '"ID"' not in done.stdout:
        sys.exit(f"ncu has counted nothing: {(done.stdout + done.stderr).strip()[-500:]}")
    return done.stdout


def read(text: str) -> list[dict[str, str | float]]:
    """A row for each launch, with ncu's numbers and, in the keys, its units."""
    units, *rows = csv.DictReader(line for line in text.splitlines() if line.startswith('"'))
    names = kernels()
    if len(rows) != len(names):
        sys.exit(f"ncu counted {len(rows)} launches, but {len(names)} were expected")
    return [
        {"kernel": name}
        | {
            f"{key} [{units[metric]}]".replace(" []", ""): float(row[metric].replace(",", ""))
            for key, metric in METRICS.items()
        }
        for name, row in zip(names, rows, strict=True)
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("file", metavar="FILE.json", nargs="?")
    parser.add_argument("--csv", metavar="FILE")
    parser.add_argument("--device", help="name of the GPU, with --csv")
    parser.add_argument("--run", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.run:
        run()
        return
    if options.file is None:
        parser.error("name the JSON file to write")
    rows = read(Path(options.csv).read_text() if options.csv else counted())
    device = options.device if options.csv else torch.cuda.get_device_name()
    Path(options.file).write_text(json.dumps({"device": device, "kernels": rows}, indent=1) + "\n")
    for row in rows:
        stalls = {key.removeprefix("stalled: ").split(" ")[0]: value for key, value in row.items() if "stalled" in key}
        print(row.pop("kernel"))
        print("   ", ", ".join(f"{key} {value:.4g}" for key, value in row.items() if "stalled" not in key))
        print(
            "    warps stalled:", ", ".join(f"{k} {v:.1f}" for k, v in sorted(stalls.items(), key=lambda i: -i[1])[:4])
        )


if __name__ == "__main__":
    main()
