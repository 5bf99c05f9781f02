import math

import pytest
import torch
from hypothesis import given, strategies as st

from rsground_nb.boxes import iou
from rsground_nb.consistency import consistency_weight, group_statistics
from rsground_nb.rewards import format_score, positional

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


@given(st.lists(st.floats(0, 1), min_size=8, max_size=8))
def test_the_weight_is_the_formula(ious):
    mean = sum(ious) / 8
    variance = sum((v - mean) ** 2 for v in ious) / 8
    weight = consistency_weight(*group_statistics(torch.tensor(ious), 8)).item()
    assert weight == pytest.approx(min(3.0, math.exp(1.2 * (1 - mean) + variance)), rel=1e-4)
    assert weight >= 1 - 1e-6
