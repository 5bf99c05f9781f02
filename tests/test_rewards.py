import math

import numpy as np
import pytest
import torch
from hypothesis import given, strategies as st

from rsground_nb.boxes import Codec, iou, parse_completion
from rsground_nb.rewards import format_score, make_rewards, positional

at, extent = st.floats(0, 1000), st.floats(1, 300)
boxes = st.tuples(at, at, extent, extent).map(lambda b: (b[0], b[1], b[0] + b[2], b[1] + b[3]))
readings = st.sampled_from(["center", "area"])


def one(box, target, **kwargs): return positional(torch.tensor([box], dtype=torch.float64), torch.tensor([target], dtype=torch.float64), **kwargs).item()


@given(boxes, boxes, readings)
def test_positional_is_bounded_and_does_not_know_units(box, target, reading):
    value = one(box, target, reading=reading)
    assert 0 <= value <= 1 + 1e-12
    assert one([3.7 * v for v in box], [3.7 * v for v in target], reading=reading) == pytest.approx(value, abs=1e-9)


@given(boxes, st.floats(0, 8), st.floats(0, 8), readings)
def test_positional_falls_with_distance(target, near, more, reading):
    width = target[2] - target[0]
    moved = lambda d: one([v + d * width * (k % 2 == 0) for k, v in enumerate(target)], target, reading=reading)
    assert moved(near + more) <= moved(near) + 1e-12
    if more > 0.1: assert moved(near + more) < moved(near)


@given(boxes, readings)
def test_positional_speaks_where_iou_is_silent_and_points_at_the_target(target, reading):
    width = target[2] - target[0]
    box = torch.tensor([[target[0] + 2 * width, target[1], target[2] + 2 * width, target[3]]], dtype=torch.float64, requires_grad=True)
    assert iou(box[0].tolist(), target) == 0
    value = positional(box, torch.tensor([target], dtype=torch.float64), reading=reading)
    value.sum().backward()
    assert value.item() > 0 and box.grad[0, 0] + box.grad[0, 2] < 0


def test_the_table_of_the_paper_notes():
    target = (0.0, 0.0, 20.0, 20.0)
    table = {"center": [1.000, .726, .278, .056, .006, .0003], "area": [.949, .700, .282, .062, .007, .0005]}
    for reading, values in table.items():
        for d, value in enumerate(values): assert one((20 * d, 0, 20 * d + 20, 20), target, reading=reading) == pytest.approx(value, abs=6e-4)


def test_boxes_without_area_earn_nothing():
    for box in [(5, 5, 5, 9), (9, 5, 5, 9), (0, 0, 0, 0)]: assert one(box, (0, 0, 10, 10)) == one(box, (0, 0, 10, 10), reading="area") == 0


@given(st.text())
def test_the_format_score_never_fails(text): assert format_score(text) in (0.0, 1.0)


@pytest.mark.parametrize("answer", ["[[4, 8, 20, 16]]", '{"bbox_2d": [4, 8, 20, 16]}', "{<4><8><20><16>}", "(4,8),(20,16)", "［4, 8, 20, 16］", "[４, 8, 20, 16]", "[4, 8, 2e1, 16]", "[+4, 8, 20, 16]", "Here: [4, 8, 20, 16]"])
def test_what_is_understood_is_not_yet_well_formed(answer):
    text = f"<think>At the left.</think><answer>{answer}</answer>"
    assert parse_completion(text).box == (4, 8, 20, 16) and format_score(text) == 0
    assert format_score(text.replace(answer, "[4, 8, 20, 16]")) == 1


@pytest.mark.parametrize("reading", ["center", "area"])
def test_every_reward_has_its_anchors(reading):
    """A perfect box, a box that touches nothing and is far away, and silence."""
    said = ["<think>Here.</think><answer>[40, 40, 60, 60]</answer>", "<think>Here.</think><answer>[940, 940, 960, 960]</answer>", "no box"]
    columns = dict(box=[[40, 40, 60, 60]] * 3, width=[1000] * 3, height=[1000] * 3)
    form, overlap, place = (f(said, **columns) for f in make_rewards(Codec(), reading=reading))
    assert form == [1, 1, 0] and overlap == [1, 0, 0]
    assert place == pytest.approx([1 if reading == "center" else 0.949, 0, 0], abs=1e-3)


def meant(u): return (np.exp(2.5 * u) - 1) / (np.exp(2.5) - 1)
def written(u): return np.exp(2.5 * u - 1) / (np.exp(2.5) - 1)
def standardised(rewards): return (rewards - rewards.mean()) / rewards.std(ddof=1)


@given(st.lists(st.floats(0, 1), min_size=3, max_size=16).filter(lambda v: max(v) - min(v) > 0.1))
def test_the_misplaced_bracket_is_invisible_in_the_advantages_of_one_reward(ious):
    assert standardised(written(np.array(ious))) == pytest.approx(standardised(meant(np.array(ious))), abs=1e-6)


def test_the_misplaced_bracket_shows_in_the_anchors_and_beside_the_format_reward():
    assert [written(0), written(1)] == pytest.approx([0.03, 0.40], abs=5e-3) and [meant(0), meant(1)] == pytest.approx([0, 1])
    u, form = np.array([0.3, 0.6, 0.9, 0]), np.array([1, 1, 0, 0])
    assert standardised(form + meant(u))[2] > -0.1 and standardised(form + written(u))[2] < -0.5
    assert standardised(form + math.e * written(u)) == pytest.approx(standardised(form + meant(u)))
