"""Drift: shares that can be counted by hand; the tables of the comparison agree with each other."""
import numpy as np
import pandas as pd
import pytest
from hypothesis import given, strategies as st
from hypothesis.extra.numpy import arrays

from conftest import ROOT
from rsground_nb.drift import SETS, drift

TABLES = {name: pd.read_csv(ROOT / "tests" / f"benchmark_segment{name}.csv", dtype={"seed": int})
          for name in ("", "_effects", "_seeds")}
TRUE = np.zeros((6, 9), bool)
TRUE[1:3, 1:4] = True
OTHERS = [(5, 0, 9, 2), (0, 4, 3, 6)]


@given(arrays(float, TRUE.shape, elements=st.floats(0, 1, width=16)))
def test_shares_are_of_the_whole_weight(weight):
    outside, wrong = drift(weight, TRUE, OTHERS)
    if not weight.any(): return  # an empty mask: NaN
    assert 0 <= wrong <= outside + 1e-9 and outside <= 1 + 1e-9  # the other boxes do not touch the target
    assert outside == pytest.approx(1 - (weight * TRUE).sum() / weight.sum(), abs=1e-6)
    assert drift(weight, TRUE, OTHERS[::-1]) == (outside, wrong)


@given(st.floats(0.1, 100))
def test_only_the_shape_counts(factor):
    weight = np.arange(54.0).reshape(TRUE.shape)
    assert drift(factor * weight, TRUE, OTHERS) == pytest.approx(drift(weight, TRUE, OTHERS))


def test_the_wrong_object_is_the_one_that_gets_most():
    weight = np.zeros(TRUE.shape)
    weight[0, 5], weight[5, :2], weight[1, 1] = 0.2, 0.15, 0.5
    assert drift(weight, TRUE, OTHERS) == pytest.approx((0.5, 0.3))
    assert drift(weight, TRUE, OTHERS[:1]) == pytest.approx((0.5, 0.2))


def test_every_arm_has_five_seeds_and_512_questions():
    scores, _, seeds = TABLES.values()
    assert set(scores["set"]) == set(SETS) and scores.groupby("set").arm.nunique().eq(9).all()
    assert scores.seeds.eq(5).all() and scores.N.eq(512).all() and seeds.N.eq(512).all()
    assert seeds.groupby(["set", "arm"]).seed.agg(lambda s: sorted(s) == [0, 1, 2, 3, 4]).all()


def test_scores_effects_and_seeds_tell_the_same():
    scores, effects, seeds = TABLES.values()
    mean = scores.set_index(["set", "arm"]).mIoU
    assert (seeds.groupby(["set", "arm"]).mIoU.mean() - mean).abs().max() < 2e-4
    on_iou = effects[effects.on == "IoU"].set_index(["set", "arm"])
    assert len(on_iou) == 24
    for (name, arm), row in on_iou.iterrows():
        assert row.IoU == pytest.approx(mean[name, "whole"] - mean[name, arm], abs=2e-4)
        assert row.IoU_low <= row.IoU <= row.IoU_high and row.IoU_seeds_low <= row.IoU <= row.IoU_seeds_high


@pytest.mark.parametrize("measure", ["missed", "response_outside", "response_wrong"])
def test_less_drift_counts_as_an_effect_above_0(measure):
    scores, effects, _ = TABLES.values()
    shares = scores.set_index(["set", "arm"])[measure]
    rows = effects[effects.on == measure].set_index(["set", "arm"])
    assert len(rows) >= 15
    for (name, arm), row in rows.iterrows():
        assert row.IoU == pytest.approx(shares[name, arm] - shares[name, "whole"], abs=2e-4)


def test_the_drift_of_an_empty_mask_counts_nowhere():
    from benchmark_segment import change
    frame = dict(question=[0, 1, 2], seed=0, image=["a", "b", "c"])
    whole, arm = (pd.DataFrame(frame | dict(outside=v)) for v in ([0.1, 0.2, 0.3], [0.2, np.nan, 0.8]))
    assert change(arm, whole, "outside")["IoU"] == pytest.approx((0.1 + 0.5) / 2)
