"""All studies, in the order in which a report shows them."""

from __future__ import annotations

from .accuracy import Accuracy
from .convergence import Convergence
from .correlation import Correlation
from .study import Study
from .timing import Time
from .variance import Variance

STUDIES: dict[str, Study] = {
    study.name: study for study in (Correlation(), Variance(), Convergence(), Accuracy(), Time())
}
