"""Which code a run was made with: a version number stays the same while the code under it changes."""

import hashlib
from functools import cache
from pathlib import Path


@cache
def sources() -> str:
    """Digest of the package's Python sources but for the studies: runs of different ones do not quite compare."""
    package = Path(__file__).parents[1]
    files = [path for path in sorted(package.rglob("*.py")) if "study" not in path.relative_to(package).parts]
    return hashlib.sha256(b"".join(path.read_bytes() for path in files)).hexdigest()[:8]
