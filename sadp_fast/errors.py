"""What error messages have in common."""

from __future__ import annotations

from typing import Any


def name_of(thing: Any) -> str:
    """What was passed, in a few words: the class of an object, or that it is a class itself."""
    return f"the class {thing.__name__}" if isinstance(thing, type) else type(thing).__name__
