"""The command `sadp-fast`: its parser, and one line for every error."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from typing import NoReturn

import torch

from .. import __version__, native
from . import data, train, train_command
from .options import CommandError
from .study import command as study_command
from .study.store import StudyError


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; returns the exit code: 0, 2 for an error (one line on standard error), 130 after Ctrl-C."""
    try:
        given = vars(_parser().parse_args(arguments))
        return given.pop("command")(given)
    except (CommandError, StudyError, data.DataError, train.TrainError) as error:
        message = str(error)
    except torch.OutOfMemoryError:
        message = "the GPU's memory is too small for this: lower --batch-size"
    except (MemoryError, RuntimeError) as error:
        # As torch tells it on the CPU.
        if isinstance(error, RuntimeError) and "DefaultCPUAllocator" not in str(error):
            raise
        message = "the computer's memory is too small for this: lower --batch-size, --time-steps or --image-size"
    except ModuleNotFoundError as error:
        if (error.name or "").startswith("sadp_fast"):
            raise
        message = f"the package {error.name!r} is missing: pip install '.[train]' brings all that training needs"
    except KeyboardInterrupt:
        print("sadp-fast: interrupted before training began; nothing was written", file=sys.stderr)
        return 130
    print(f"sadp-fast: error: {' '.join(message.split())}", file=sys.stderr)
    return 2


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise CommandError(f"{message} (see {self.prog} --help)")


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog="sadp-fast",
        description="Train spiking networks on the examples that matter.",
        formatter_class=argparse.RawDescriptionHelpFormatter,  # paths are not broken into lines
    )
    parser.add_argument("--version", action="version", version=f"sadp-fast {__version__}\n{native.description()}")
    commands = parser.add_subparsers(required=True, metavar="train|study")
    train_command.add_parser(commands)
    study_command.add_parser(commands)
    return parser


if __name__ == "__main__":
    sys.exit(main())
