"""Kernels that are prepared for one key and kept."""

import gc
import weakref

import pytest
import torch

from sadp_fast.ops.common.autotune import Choices, autotune
from sadp_fast.ops.common.prepared import Prepared, keep, kept


class Plan:
    """Stands in for a kernel in a configuration."""

    def __init__(self, configuration, x):
        self.configuration, self.steps = configuration, len(x)

    def run(self, x):
        return self.configuration, self.steps * x


def prepared(plans=None, candidates=("curated", "other")) -> Prepared:
    def plan(configuration, x):
        if plans is not None:
            plans.append(configuration)
        return Plan(configuration, x)

    return Prepared(Choices("a kernel"), "key", lambda x: candidates, plan)


def test_the_first_run_chooses_and_the_others_go_straight_to_the_plan():
    plans = []
    kernel = prepared(plans)
    assert kernel.plan is None
    for _ in range(3):
        configuration, result = kernel.run(torch.ones(2))
        assert configuration == "curated" and result.tolist() == [2, 2]
    assert plans == ["curated"] and kernel.run == kernel.plan.run


def test_the_tensors_of_a_run_are_not_kept():
    kernel, x = prepared(), torch.ones(2)
    kernel.run(x)
    seen = weakref.ref(x)
    del x
    gc.collect()
    assert seen() is None


def test_a_run_that_fails_keeps_nothing_and_can_be_repeated():
    kernel = prepared(candidates=())
    x = torch.ones(2)
    with pytest.raises(IndexError):
        kernel.run(x)
    seen = weakref.ref(x)
    del x
    gc.collect()
    assert seen() is None and kernel.plan is None
    with pytest.raises(IndexError):
        kernel.run(torch.ones(2))


def test_what_is_kept_goes_where_an_autotune_begins_and_where_there_is_much():
    plans = kept()
    assert keep(plans, "a", 1) == 1 and plans == {"a": 1}
    with autotune():
        assert plans == {}
        keep(plans, "a", 1)
    assert plans == {"a": 1}
    for number in range(3):
        keep(plans, number, number, most=2)
    assert plans == {1: 1, 2: 2}
