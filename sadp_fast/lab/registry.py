"""Registries: records of one kind, found by their names."""

from __future__ import annotations

from typing import Protocol, TypeVar


class Named(Protocol):
    """A record with a name."""

    @property
    def name(self) -> str: ...


Record = TypeVar("Record", bound=Named)


def by_name(*records: Record) -> dict[str, Record]:
    """The records by their names, in this order; raises ValueError for a name that is there twice."""
    found = {record.name: record for record in records}
    if len(found) < len(records):
        raise ValueError(f"two records have one name among {', '.join(record.name for record in records)}")
    return found
