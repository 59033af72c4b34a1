"""Which code a run was made with: a version number stays the same while the code under it changes."""

import hashlib
from functools import cache
from pathlib import Path


@cache
def sources() -> str:
    """Digest of the code that trains, the studies left out: runs of different code do not quite compare.

    It is that of the package's Python files and, in a clone, of csrc.
    """
    package = Path(__file__).parents[1]
    files = [path for path in sorted(package.rglob("*.py")) if path.relative_to(package).parts[:2] != ("lab", "study")]
    files += sorted(path for path in (package.parent / "csrc").rglob("*") if path.is_file())
    return hashlib.sha256(b"".join(path.read_bytes() for path in files)).hexdigest()[:8]
