"""Objects that settings ask for by name, beside those that users bring along."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Generic, TypeVar

from ..errors import check_choice, name_of

T = TypeVar("T")


class Registry(dict[str, T], Generic[T]):
    """Objects of one kind by their ``name``, in the order in which they were added.

    Args:
        kind: what they are in an error message, such as "score".
        base: their class, of which a user's own object is an instance too.
        things: the first objects.
    """

    def __init__(self, kind: str, base: type[T], things: Iterable[T] = ()) -> None:
        self.kind, self.base = kind, base
        self.add(*things)

    def add(self, *things: T) -> None:
        """Let these objects be known by their names."""
        for thing in things:
            self[thing.name] = thing  # type: ignore[attr-defined]

    def find(self, asked: str | T) -> T:
        """The object of this name, or the object itself.

        Raises:
            ValueError: there is no such name, or the object has that of another one.
            TypeError: it is neither a name nor an object of this kind with a name of its own.
        """
        if isinstance(asked, str):
            check_choice(self.kind, asked, self)
            return self[asked]
        if not isinstance(asked, self.base) or not isinstance(getattr(asked, "name", None), str):
            raise TypeError(
                f"{self.kind} must be a name or a {self.base.__name__} with a `name`, got {name_of(asked)}: choose one "
                f"of {', '.join(self)}, or pass an instance of your own subclass"
            )
        if self.get(asked.name, asked) is not asked:  # type: ignore[attr-defined]
            raise ValueError(f"{self.kind} has the name of another one, {asked.name!r}: give it a name of its own")  # type: ignore[attr-defined]
        return asked
