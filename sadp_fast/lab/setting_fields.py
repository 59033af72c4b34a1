"""The options and readers made of settings, whose fields carry their help, choices and range."""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable, Iterable
from dataclasses import Field, fields
from typing import Any

from ..prune.settings import setting as setting


class SettingError(argparse.ArgumentTypeError, ValueError):  # the first, so that readers can be types of options
    """Text that names no method, setting or value; the message says why."""


def number(kind: type, condition: Callable[[Any], bool], requirement: str) -> Callable[[str], Any]:
    """Reader of a number from text, which raises SettingError where it is not as required."""

    def read(text: str) -> Any:
        try:
            value = kind(text)
        except ValueError:
            value = math.nan
        if not condition(value):
            raise SettingError(f"{text!r} is not {requirement}")
        return value

    return read


def one_of(*choices: str) -> Callable[[str], str]:
    """Reader of one of these words, which raises SettingError for any other."""

    def read(text: str) -> str:
        if text not in choices:
            raise SettingError(f"{text!r} is not one of {','.join(choices)}")
        return text

    return read


def reader(of: Field[Any]) -> Callable[[str], Any]:
    """What reads a setting's value from text."""
    if isinstance(of.default, bool):
        return lambda text: one_of("true", "false")(text) == "true"
    if "choices" in of.metadata:
        return one_of(*of.metadata["choices"])
    if "range" in of.metadata:
        return number(float if "float" in str(of.type) else int, *of.metadata["range"])
    return of.metadata.get("read", str)


def add_options(group: Any, settings: type, names: Iterable[str] | None = None) -> None:
    """Add an option for each setting of a dataclass, or for those named, to a group of a parser."""
    for each in fields(settings):
        if "help" in each.metadata and (names is None or each.name in names):
            add_option(group, each)


def add_option(group: Any, of: Field[Any]) -> None:
    """Add a setting's option; its default is only told, so that what was given is known."""
    told = of.metadata
    flag, more = f"--{of.name.replace('_', '-')}", {"help": told["help"]}
    if isinstance(of.default, bool):
        group.add_argument(flag, action="store_true", **more)
        return
    if "metavar" in told:
        more["metavar"] = told["metavar"]
    if "choices" in told:
        more["choices"] = tuple(told["choices"])
        if "metavar" in told:  # where lines break between the names
            more["help"] = ": ".join(filter(None, (told["help"], ", ".join(told["choices"]))))
    else:
        more["type"] = reader(of)
    default = told.get("shown", f"{of.default:g}" if isinstance(of.default, float) else of.default)
    if default not in (None, ""):
        more["help"] += f" (default: {default})"
    group.add_argument(flag, **more)
