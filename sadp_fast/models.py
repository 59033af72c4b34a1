"""The laboratory's networks under their public name, ``sadp_fast.models``; they live in ``lab/models``.

The one place where the library names the laboratory: nothing of the package imports this module.
"""

from .lab.models import NAMES, PerStep, SEWBlock, SpikingNetwork, build

__all__ = ["NAMES", "PerStep", "SEWBlock", "SpikingNetwork", "build"]
