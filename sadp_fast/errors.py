"""What error messages have in common."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any


def name_of(thing: Any) -> str:
    """What was passed, in a few words: the class of an object, or that it is a class itself."""
    return f"the class {thing.__name__}" if isinstance(thing, type) else type(thing).__name__


def check_choice(argument: str, value: Any, choices: Collection[str | None]) -> None:
    """Raise ValueError unless the value is one of the choices."""
    if value not in choices:
        names = ", ".join(map(str, choices))
        raise ValueError(f"{argument} must be one of {names}, got {value!r}: choose one of them")
