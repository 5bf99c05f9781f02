"""Scores against numbers worked out by hand, files with every defect, and properties
that any scorer should have."""
import json
import os
import random
import re
import warnings
from fractions import Fraction

import numpy as np
import pandas as pd
import pytest
from datasets import Dataset
from hypothesis import assume, example, given, settings, strategies as st
from shapely.geometry import box as shape

from rsground_nb.boxes import iou
from rsground_nb.data import load_folder, to_dataset
from rsground_nb.evaluate import (central, constant_guess, interval, largest_object, random_boxes,
                                  read_predictions, resampled, score, without_model, words_alone,
                                  write_predictions)
from rsground_nb.grammar import cues, region
from rsground_nb.scoring import (check_predictions, compare_modes, cue_types, evaluate_file, FIVE,
                                 FRAME_NAMES, load_predictions, mask_metrics, MODES, score_strata, strata,
                                 tally)
from rsground_nb.shapes import encode_mask, read_mask

# One table per mode: predicted, true, IoU as a fraction, how it comes about. None: no box was answered. T is
# the truth unless another is given.
T = (0, 0, 10, 10)
STANDARD = [  # any image size
    (T, T, Fraction(1), "the same"),
    ((0, 0, 5, 10), T, Fraction(1, 2), "half: exactly on the threshold"),
    ((0, 0, 10, 6), T, Fraction(3, 5), "on 0.6"),
    ((0, 0, 10, 7), T, Fraction(7, 10), "on 0.7"),
    ((0, 0, 10, 8), T, Fraction(4, 5), "on 0.8"),
    ((0, 0, 10, 9), T, Fraction(9, 10), "on 0.9"),
    ((5, 5, 15, 15), T, Fraction(1, 7), "25 of 100 + 100 - 25"),
    ((10, 0, 20, 10), T, Fraction(0), "touching along a side"),
    ((10, 10, 20, 20), T, Fraction(0), "touching at a corner"),
    ((20, 20, 30, 30), T, Fraction(0), "apart"),
    ((2, 2, 8, 8), T, Fraction(9, 25), "contained: 36 of 100"),
    ((-5, -5, 15, 15), T, Fraction(1, 4), "around it, over the edge: 100 of 400"),
    ((0, 0, 20, 20), T, Fraction(1, 4), "100 of 400"),
    ((1, 0, 11, 10), T, Fraction(9, 11), "90 of 110"),
    ((0, 3, 10, 13), T, Fraction(7, 13), "70 of 130"),
    ((9, 9, 19, 19), T, Fraction(1, 199), "one pixel: 1 of 199"),
    ((0.5, 0, 10.5, 10), T, Fraction(19, 21), "95 of 105"),
    ((0, 0, 1, 1), T, Fraction(1, 100), "one pixel of it"),
    ((5, 5, 5, 5), T, Fraction(0), "a point has no area"),
    ((0, 0, 10, 0), T, Fraction(0), "a line has no area"),
    ((10, 10, 0, 0), T, Fraction(0), "both corners swapped"),
    ((10, 0, 0, 10), T, Fraction(0), "left and right swapped"),
    ((-10, -10, -1, -1), T, Fraction(0), "outside the image"),
    (None, T, Fraction(0), "unparsable"),
    ((3, 3, 3, 3), (3, 3, 3, 3), Fraction(0), "two points: 0 of 0"),
    ((0, 0, 10, 10), (4, 4, 4, 4), Fraction(0), "the truth is a point"),
]
E = Fraction(1, 10 ** 6)
LQVG = [  # (I + E) / (U + E)
    (T, T, (100 + E) / (100 + E), "the same"),
    ((0, 0, 5, 10), T, Fraction(1, 2), "half; E is lost in 32 bits, and > does not hold"),
    ((0, 0, 10, 6), T, (60 + E) / (100 + E), ""),
    ((0, 0, 10, 7), T, (70 + E) / (100 + E), ""),
    ((0, 0, 10, 8), T, (80 + E) / (100 + E), ""),
    ((0, 0, 10, 9), T, (90 + E) / (100 + E), ""),
    ((5, 5, 15, 15), T, (25 + E) / (175 + E), ""),
    ((10, 0, 20, 10), T, E / (200 + E), "touching: not 0"),
    ((10, 10, 20, 20), T, E / (200 + E), ""),
    ((20, 20, 30, 30), T, E / (200 + E), "apart: not 0"),
    ((2, 2, 8, 8), T, (36 + E) / (100 + E), ""),
    ((-5, -5, 15, 15), T, (100 + E) / (400 + E), ""),
    ((1, 0, 11, 10), T, (90 + E) / (110 + E), ""),
    ((0, 3, 10, 13), T, (70 + E) / (130 + E), ""),
    ((9, 9, 19, 19), T, (1 + E) / (199 + E), ""),
    ((0, 0, 1, 1), T, (1 + E) / (100 + E), ""),
    ((5, 5, 5, 5), T, E / (100 + E), "a point"),
    ((10, 10, 0, 0), T, E / (200 + E), "both axes swapped: an area of 100, and no overlap"),
    ((10, 0, 0, 10), T, Fraction(1), "swapped in x: an area of -100, E / E"),
    ((20, 0, 0, 10), T, E / (-100 + E), "-200 + 100"),
    (None, T, Fraction(0), "unparsable: 0 [ours]"),
    ((3, 3, 3, 3), (3, 3, 3, 3), Fraction(1), "two points: E / E"),
    ((7, 7, 7, 7), (3, 3, 3, 3), Fraction(1), "two points, apart: E / E as well"),
    ((0, 0, 0.001, 0.001), (0, 0, 0.001, 0.002), Fraction(2, 3), "I = E, U = 2 E: 2 E of 3 E"),
    ((-10, -10, -1, -1), T, E / (181 + E), "outside: 100 + 81"),
]
Q = (0, 0, 32, 32)
LPVA = [  # image 64 x 64, so that shares are exact; the prediction is clamped to the image
    (Q, Q, Fraction(1), "the same"),
    ((0, 0, 16, 32), Q, Fraction(1, 2), "half: counts, >="),
    ((0, 0, 32, 24), Q, Fraction(3, 4), ""),
    ((0, 0, 32, 20), Q, Fraction(5, 8), ""),
    ((0, 0, 32, 28), Q, Fraction(7, 8), ""),
    ((16, 16, 48, 48), Q, Fraction(1, 7), "256 of 1792"),
    ((16, 0, 48, 32), Q, Fraction(1, 3), "512 of 1536"),
    ((8, 0, 40, 32), Q, Fraction(3, 5), "768 of 1280"),
    ((8, 8, 24, 24), Q, Fraction(1, 4), "256 of 1024"),
    ((32, 0, 64, 32), Q, Fraction(0), "touching"),
    ((-16, -16, 32, 32), Q, Fraction(1), "clamped to the truth; plain IoU is 4/9"),
    ((0, 0, 64, 64), Q, Fraction(1, 4), ""),
    ((0, 0, 100, 100), Q, Fraction(1, 4), "clamped to 64 x 64"),
    ((-10, 0, 16, 32), Q, Fraction(1, 2), "clamped, then half"),
    ((80, 80, 90, 90), Q, Fraction(0), "outside: clamped to a point"),
    ((-20, -20, -10, -10), Q, Fraction(0), "outside"),
    ((32, 32, 0, 0), Q, Fraction(0), "swapped"),
    ((5, 5, 5, 5), Q, Fraction(0), "a point"),
    ((5, 5, 5, 5), (5, 5, 5, 5), Fraction(0), "two points: 0 of 1e-16"),
    (None, Q, Fraction(0), "unparsable"),
    ((32, 32, 70, 70), (32, 32, 64, 64), Fraction(1), "over the far edge"),
    ((48, 32, 200, 64), (32, 32, 64, 64), Fraction(1, 2), "over the far edge"),
    ((48, 48, 80, 80), (48, 48, 80, 80), Fraction(1, 4), "only the prediction is clamped: 256 of 1024"),
    ((0, 0, 2, 2), (0, 0, 1, 1), Fraction(1, 4), "tiny"),
]
C = (10, 10, 19, 19)
VRSBENCH = [  # image 100 x 100, so that a pixel is a cell; every side one longer
    (C, C, Fraction(1), "100 cells"),
    ((10, 10, 19, 14), C, Fraction(1, 2), "50 of 100: counts, >="),
    ((10, 10, 19, 16), C, Fraction(7, 10), "on 0.7"),
    ((15, 15, 24, 24), C, Fraction(1, 7), "25 of 175"),
    ((20, 10, 29, 19), C, Fraction(0), "next column of cells"),
    ((19, 10, 28, 19), C, Fraction(1, 19), "plainly touching: 10 of 190"),
    ((19, 19, 28, 28), C, Fraction(1, 199), "touching at a corner: 1 of 199"),
    ((15, 15, 15, 15), C, Fraction(1, 100), "a point is one cell"),
    ((5, 5, 5, 5), (5, 5, 5, 5), Fraction(1), "two points: one cell of one"),
    ((5, 5, 6, 6), (5, 5, 5, 5), Fraction(1, 4), "one cell of four"),
    ((11, 11, 13, 13), (10, 10, 12, 12), Fraction(2, 7), "4 of 14; plain IoU is 1/7"),
    ((0, 0, 2, 2), (0, 0, 1, 1), Fraction(4, 9), "tiny; plain IoU is 1/4"),
    ((10, 10, 29, 19), C, Fraction(1, 2), "100 of 200"),
    ((0, 0, 99, 99), C, Fraction(1, 100), "100 of 10,000"),
    ((12, 12, 17, 17), C, Fraction(9, 25), "36 of 100"),
    ((50, 50, 60, 60), C, Fraction(0), "apart"),
    ((-10, -10, -1, -1), C, Fraction(0), "read as 10, 10, 1, 1: swapped"),
    ((-10, -10, 19, 19), C, Fraction(1), "read without the signs"),
    ((0, 0, 119, 9), (0, 0, 99, 9), Fraction(5, 6), "beyond the picture: 1000 of 1200"),
    ((19, 19, 10, 10), C, Fraction(0), "swapped"),
    ((11, 10, 10, 19), C, Fraction(0), "swapped by one cell: width 0"),
    (None, C, Fraction(0), "unparsable"),
]
VRSBENCH_800 = [  # image 800 x 800: 8 px a cell, halves to the even number [ours]
    ((83, 80, 152, 152), (80, 80, 152, 152), Fraction(1), "83 / 8 = 10.375: cell 10"),
    ((84, 80, 152, 152), (80, 80, 152, 152), Fraction(1), "84 / 8 = 10.5: cell 10"),
    ((85, 80, 152, 152), (80, 80, 152, 152), Fraction(9, 10), "85 / 8 = 10.625: cell 11"),
    ((92, 80, 152, 152), (80, 80, 152, 152), Fraction(4, 5), "92 / 8 = 11.5: cell 12"),
    ((96, 96, 100, 100), (100, 100, 104, 104), Fraction(1, 4),
     "4 px, plainly touching: cell 12 of cells 12 and 13"),]
VLM_R1 = [  # an overlap of at most 1 px in x or y is none
    (T, T, Fraction(1), ""),
    ((0, 0, 5, 10), T, Fraction(1, 2), "half: does not count, >"),
    ((5, 5, 15, 15), T, Fraction(1, 7), ""),
    ((9, 0, 19, 10), T, Fraction(0), "1 px wide; plain IoU is 1/19"),
    ((8.5, 0, 18.5, 10), T, Fraction(3, 37), "1.5 px wide: 15 of 185"),
    ((8, 0, 18, 10), T, Fraction(1, 9), "2 px wide: 20 of 180"),
    ((9, 9, 19, 19), T, Fraction(0), "1 px both ways; plain IoU is 1/199"),
    ((0, 9, 10, 19), T, Fraction(0), "1 px high; plain IoU is 1/19"),
    ((0, 0, 10, 1), T, Fraction(0), "1 px high, inside; plain IoU is 1/10"),
    ((0, 0, 10, 2), T, Fraction(1, 5), "2 px high"),
    ((2, 2, 8, 8), T, Fraction(9, 25), ""),
    ((0, 0, 20, 20), T, Fraction(1, 4), ""),
    ((0, 0, 10, 6), T, Fraction(3, 5), ""),
    ((1, 0, 11, 10), T, Fraction(9, 11), ""),
    ((10, 0, 20, 10), T, Fraction(0), "touching"),
    ((20, 20, 30, 30), T, Fraction(0), "apart"),
    ((0, 0, 0, 0), T, Fraction(0), "what an unparsable answer is read as"),
    (None, T, Fraction(0), "unparsable"),
    ((10, 10, 0, 0), T, Fraction(0), "swapped"),
    ((0, 0, 1, 1), (0, 0, 1, 1), Fraction(0), "a perfect box in 0-1 units"),
    ((0.1, 0.1, 0.9, 0.9), (0.1, 0.1, 0.9, 0.9), Fraction(0), "a perfect box in 0-1 units"),
    ((0, 0, 2, 2), (0, 0, 2, 2), Fraction(1), "a perfect box of 2 px"),
    ((1, 0, 3, 2), (0, 0, 2, 2), Fraction(0), "1 px wide; plain IoU is 1/3"),
    ((0, 0, 1, 5), (0, 0, 1, 5), Fraction(0), "a perfect box 1 px wide"),
    ((3, 3, 3, 3), (3, 3, 3, 3), Fraction(0), "two points [ours]"),
]
X = (10, 10, 20, 20)  # read as x 10-30, y 10-30: 400
RSTHINKER = [  # x, y, width, height
    (X, X, Fraction(1), ""), ((10, 10, 10, 20), X, Fraction(1, 2), "half: counts, >="),
    ((10, 10, 20, 14), X, Fraction(7, 10), ""), ((10, 10, 20, 15), X, Fraction(3, 4), "on 0.75"),
    ((10, 10, 20, 16), X, Fraction(4, 5), ""), ((10, 10, 20, 19), X, Fraction(19, 20), "on 0.95"),
    ((20, 20, 20, 20), X, Fraction(1, 7), "20-40: 100 of 700; as corners a point"),
    ((30, 10, 20, 20), X, Fraction(0), "touching"), ((0, 0, 40, 40), X, Fraction(1, 4), "400 of 1600"),
    ((12, 12, 20, 20), X, Fraction(81, 119), "324 of 476"),
    ((15, 10, 20, 20), X, Fraction(3, 5), "300 of 500"),
    ((20, 20, 10, 10), X, Fraction(1, 4), "as corners swapped, here 20-30: 100 of 400"),
    ((9, 9, 19, 19), X, Fraction(324, 437), "9-28: 324 of 361 + 400 - 324"),
    ((50, 50, 5, 5), X, Fraction(0), "apart"), ((10, 10, 0, 0), X, Fraction(0), "no size"),
    ((10, 10, -5, 20), X, Fraction(0), "negative width"), (None, X, Fraction(0), "unparsable"),
    ((5, 5, 0, 0), (5, 5, 0, 0), Fraction(0), "two boxes without size [ours]"),
    ((100, 100, 120, 140), (100, 100, 140, 140), Fraction(6, 7),
     "corners read as sizes: 120 x 140 of 140 x 140; plain IoU is 1/2"),
    ((120, 100, 160, 140), (100, 100, 140, 140), Fraction(2, 3), "16,800 of 25,200; plain IoU is 1/3"),
    ((440, 400, 480, 440), (400, 400, 440, 440), Fraction(10, 13), "176,000 of 228,800; plainly they touch"),
    ((0, 0, 40, 40), (400, 400, 440, 440), Fraction(0), "apart"),]
TABLES = [("standard", STANDARD, 100), ("lqvg", LQVG, 100), ("lpva", LPVA, 64), ("vrsbench", VRSBENCH, 100),
          ("vrsbench", VRSBENCH_800, 800), ("vlm_r1", VLM_R1, 100), ("rsthinker", RSTHINKER, 1000)]
# counted in the tables
HITS = {"standard": {0.5: 9, 0.6: 7, 0.7: 6, 0.8: 5, 0.9: 3},
        "lqvg": {0.5: 11, 0.6: 9, 0.7: 7, 0.8: 6, 0.9: 4}, "lpva": {0.5: 10, 0.6: 7, 0.7: 5, 0.8: 4, 0.9: 3},
        "vrsbench": {0.5: 7, 0.7: 5}, "vlm_r1": {0.5: 4}, "rsthinker": {0.5: 12, 0.75: 6, 0.95: 2}}


def arrays(table, side):
    predicted = np.array([[np.nan] * 4 if p is None else p for p, *_ in table], float)
    return predicted, np.array([t for _, t, *_ in table], float), np.full((len(table), 2), float(side))


@pytest.mark.parametrize("mode, table, side", TABLES, ids=lambda v: v if isinstance(v, str) else None)
def test_a_mode_gives_the_numbers_worked_out_by_hand(mode, table, side):
    found = MODES[mode].ious(*arrays(table, side))[0]
    for (predicted, true, expected, why), value in zip(table, found):
        assert value == pytest.approx(float(expected), rel=1e-6, abs=1e-12), (predicted, true, why)


def test_there_are_twenty_boxes_for_every_mode():
    assert {mode for mode, *_ in TABLES} == set(MODES)
    for mode in MODES: assert sum(len(table) for name, table, _ in TABLES if name == mode) >= 20


@pytest.mark.parametrize("mode, table, side", [t for t in TABLES if t[1] is not VRSBENCH_800],
                         ids=lambda v: v if isinstance(v, str) else None)
def test_thresholds_count_as_the_scorer_counts_them(mode, table, side):
    found = tally(*arrays(table, side), mode)
    for threshold, hits in HITS[mode].items(): assert found[f"Pr@{threshold}"][0].sum() == hits, threshold
    assert [name for name in found if name.startswith("Pr@")] == [f"Pr@{t}" for t in HITS[mode]]


def test_means_and_sums_of_the_standard_set():
    """26 boxes, 24 truths of 100 px and two points. Sums written out from the table."""
    row = compare_modes(*arrays(STANDARD, 100), list(range(len(STANDARD))), modes=["standard"],
                        draws=50).iloc[0]
    assert row.N == 26 and row.unparsable == pytest.approx(1 / 26) and row.no_area == pytest.approx(5 / 26)
    assert row.meanIoU == pytest.approx(float(sum(expected for _, _, expected, _ in STANDARD)) / 26)
    shared = 100 + 50 + 60 + 70 + 80 + 90 + 25 + 36 + 100 + 100 + 90 + 70 + 1 + 95 + 1
    union = (6 * 100 + 175 + 200 + 200 + 200 + 100 + 400 + 400 + 110 + 130 + 199 + 105 + 100 + 4 * 100 + 181
             + 100 + 0 + 100)
    assert row.cumIoU == pytest.approx(shared / union)


@pytest.mark.parametrize("mode, predicted, true, side, shared, union", [
    ("standard", (5, 5, 15, 15), T, 100, 25, 175), ("lqvg", (0, 0, 5, 10), T, 100, 50, 100),
    ("lpva", (0, 0, 16, 32), Q, 64, 1 / 8, 1 / 4), ("vrsbench", (19, 10, 28, 19), C, 100, 10, 190),
    ("vlm_r1", (8, 0, 18, 10), T, 100, 20, 180), ("vlm_r1", (9, 0, 19, 10), T, 100, 0, 200),
    ("rsthinker", (20, 20, 20, 20), X, 1000, 100, 700)])
def test_what_goes_into_the_sums_is_in_the_units_of_the_mode(mode, predicted, true, side, shared, union):
    """Pixels, shares of the image, cells. An overlap that vlm_r1 does not count is not
    taken off the union either."""
    assert [v.item() for v in MODES[mode].ious(*arrays([(predicted, true)], side))[1:]] == pytest.approx(
        [shared, union])


def test_an_answer_without_a_box_keeps_the_truth_in_the_union_but_in_vrsbench():
    for mode in MODES:
        (value,), (shared,), (union,) = MODES[mode].ious(np.full((1, 4), np.nan),
                                                         np.array([[0.0, 0, 10, 10]]), np.array([[20.0, 20]]))
        assert value == shared == 0 and (union > 0) == (mode != "vrsbench"), mode


# The three scorers once more, one box at a time, as their repositories go about it: (IoU, intersection,
# union)

def lqvg_by_hand(p, t, width, height):
    p, t, epsilon = np.float32(p), np.float32(t), np.float32(1e-6)
    over = max(min(p[2], t[2]) - max(p[0], t[0]), np.float32(0)) * max(min(p[3], t[3]) - max(p[1], t[1]),
                                                                       np.float32(0))
    union = (p[2] - p[0]) * (p[3] - p[1]) + (t[2] - t[0]) * (t[3] - t[1]) - over
    return (over + epsilon) / (union + epsilon) if union != -epsilon else 0, over, union


def lpva_by_hand(p, t, width, height):
    """A square of 640, the picture in its middle; the network's box is centre and size, from 0 to 1."""
    scale = 640 / max(width, height)
    def seen(box):
        x1, x2 = (v * scale + (640 - width * scale) / 2 for v in (box[0], box[2]))
        y1, y2 = (v * scale + (640 - height * scale) / 2 for v in (box[1], box[3]))
        x, y, w, h = (x1 + x2) / 1280, (y1 + y2) / 1280, (x2 - x1) / 640, (y2 - y1) / 640
        return x - w / 2, y - h / 2, x + w / 2, y + h / 2
    p, t = [min(max(v, 0), 1) for v in seen(p)], seen(t)
    over = max(min(p[2], t[2]) - max(p[0], t[0]), 0) * max(min(p[3], t[3]) - max(p[1], t[1]), 0)
    union = (p[2] - p[0]) * (p[3] - p[1]) + (t[2] - t[0]) * (t[3] - t[1]) - over
    return over / (union + 1e-16), over, union


def vrsbench_by_hand(p, t, width, height):
    """Both boxes are texts of whole numbers; whatever digits stand there are read."""
    p, t = ([int(v) for v in re.findall(r"\d+", "".join(f"<{round(100 * v / side)}>"
                                                        for v, side in zip(box, (width, height) * 2)))]
            for box in (p, t))
    over = max(0, min(p[2], t[2]) - max(p[0], t[0]) + 1) * max(0, min(p[3], t[3]) - max(p[1], t[1]) + 1)
    union = (p[2] - p[0] + 1) * (p[3] - p[1] + 1) + (t[2] - t[0] + 1) * (t[3] - t[1] + 1) - over
    return over / union if union else 0, over, union


edge = st.integers(-300, 1300).map(float)
wild = st.tuples(edge, edge, edge, edge)


@settings(max_examples=400, deadline=None)
@given(wild, wild, st.integers(100, 1000), st.integers(100, 1000))
@example((907, 386, 881, 499), (880, 382, 906, 495), 1024, 512)
@example((100, 200, 300, 400), (100, 200, 300, 320), 640, 320)
@example((-10, -7, 121, 320), (56, 303, 121, 320), 512, 640)
def test_three_modes_are_the_originals_on_boxes_beyond_the_picture_swapped_or_negative(p, t, width, height):
    true = min(t[0], t[2]), min(t[1], t[3]), max(t[0], t[2]) + 1, max(t[1], t[3]) + 1
    for mode, by_hand in dict(lqvg=lqvg_by_hand, lpva=lpva_by_hand, vrsbench=vrsbench_by_hand).items():
        expected = by_hand(p, true, width, height)
        assume(abs(expected[2]) > 1e-5 or expected[2] == 0)  # lpva: a difference of rounding
        found = [v.item() for v in MODES[mode].ious(np.array([p]), np.array([true]),
                                                    np.array([[width, height]], float))]
        assert found == pytest.approx([float(v) for v in expected], rel=1e-3, abs=1e-3), mode


coordinate = st.integers(0, 60).map(float) | st.floats(-20, 120, allow_nan=False, width=32)
any_box = st.tuples(*[coordinate] * 4)


@settings(max_examples=400)
@given(any_box, any_box)
def test_standard_is_the_iou_of_chapter_01_and_of_shapely(a, b):
    true = (min(b[0], b[2]), min(b[1], b[3]), max(b[0], b[2]), max(b[1], b[3]))
    value, shared, union = (v.item()
                            for v in MODES["standard"].ious(np.array([a]), np.array([true]), np.ones((1, 2))))
    assert value == pytest.approx(iou(a, true), abs=1e-9)
    if a[0] <= a[2] and a[1] <= a[3]:
        p, t = shape(*a), shape(*true)
        assert (shared == pytest.approx(p.intersection(t).area, abs=1e-6)
                and union == pytest.approx(p.union(t).area, abs=1e-6))


@settings(max_examples=200)
@given(st.sampled_from([m for m in MODES if m != "rsthinker"]), any_box, any_box, st.integers(1, 200),
       st.integers(1, 200))
def test_every_mode_stays_between_0_and_1(mode, a, b, width, height):
    """Upright boxes without a minus sign, where a scorer with signed areas or one
    that drops the sign is asked."""
    def upright(box):
        return min(box[0], box[2]), min(box[1], box[3]), max(box[0], box[2]), max(box[1], box[3])
    if mode in ("lqvg", "lpva", "vrsbench"): a, b = upright([abs(v) for v in a]), [abs(v) for v in b]
    value, shared, union = (v.item() for v in MODES[mode].ious(np.array([a]), np.array([upright(b)]),
                                                               np.array([[width, height]], float)))
    assert 0 <= value <= 1 + 1e-6 and 0 <= shared <= union * (1 + 1e-6)


# ---- intervals

def simulated(n, images, seed, side=800.0):
    rng = np.random.default_rng(seed)
    size = rng.uniform(10, 300, (n, 2))
    corner = rng.uniform(0, 1, (n, 2)) * (side - size)
    true = np.concatenate([corner, corner + size], 1)
    predicted = true + rng.normal(0, 1, (n, 4)) * np.tile(size, 2) / 6
    predicted[rng.random(n) < 0.05] = np.nan
    return predicted, true, np.full((n, 2), side), rng.integers(images, size=n)


def test_the_matrix_product_equals_drawing_image_by_image():
    values, images = np.random.default_rng(0).random(60), np.random.default_rng(1).integers(9, size=60)
    names, rng = np.unique(images), np.random.default_rng(5)
    means = [np.concatenate([values[images == names[k]] for k in rng.integers(len(names), size=len(names))])
             .mean() for _ in range(300)]
    assert interval(values, images, seed=5, draws=300) == pytest.approx(np.quantile(means, (0.025, 0.975)))


def test_draws_in_chunks_are_the_draws_in_one_piece():
    """2,100 images: the chunks are 952 draws long."""
    sums = np.random.default_rng(0).random((2100, 3))
    drawn = np.random.default_rng(7).integers(2100, size=(1000, 2100))
    assert np.allclose(resampled(sums, 7, 1000), sums[drawn].sum(1))


def test_same_seed_same_numbers_and_another_seed_another_interval():
    made = simulated(300, 120, 0)
    first, again, other = (compare_modes(*made, seed=s, draws=200) for s in (3, 3, 4))
    pd.testing.assert_frame_equal(first, again)
    assert ((first["meanIoU"] == other["meanIoU"]).all()
            and (first["meanIoU_low"] != other["meanIoU_low"]).any())


@settings(max_examples=30)
@given(st.integers(2, 200), st.integers(0, 1000))
def test_the_interval_holds_the_value(n, seed):
    table = compare_modes(*simulated(n, n, seed), draws=200, seed=seed)
    for name in ("unparsable", "Pr@0.5", "meanIoU", "cumIoU"):
        assert ((table[f"{name}_low"] <= table[name] + 1e-9).all()
                and (table[name] <= table[f"{name}_high"] + 1e-9).all()), name


def test_the_interval_shrinks_with_the_root_of_the_number_of_images():
    widths = [(t["meanIoU_high"] - t["meanIoU_low"])[0]
              for t in (compare_modes(*simulated(n, n, 0), modes=["standard"]) for n in (200, 3200))]
    assert widths[0] / widths[1] == pytest.approx(4, rel=0.25)


def test_the_interval_covers_the_truth_about_95_times_in_100():
    """300 samples of 80 images with two expressions each; the two agree, so an interval over
    expressions would be too narrow."""
    rng, over_images, over_rows = np.random.default_rng(0), 0, 0
    for k in range(300):
        values, images = np.repeat(rng.random(80), 2), np.repeat(np.arange(80), 2)
        for name, groups in (("images", images), ("rows", np.arange(160))):
            low, high = interval(values, groups, seed=k, draws=300)
            if name == "images": over_images += low <= 0.5 <= high
            else: over_rows += low <= 0.5 <= high
    assert 0.9 < over_images / 300 < 0.98 and over_rows / 300 < 0.9


def test_the_order_of_the_rows_does_not_matter():
    made = simulated(200, 60, 1)
    order = np.random.default_rng(2).permutation(200)
    pd.testing.assert_frame_equal(compare_modes(*made, draws=100),
                                  compare_modes(*(a[order] for a in made), draws=100))


def test_the_modes_of_a_file_order_as_field_notes_say():
    """Small boxes: the grid inflates, reading corners as sizes inflates more (both simulated)."""
    predicted, true, sides, images = simulated(2000, 2000, 3)
    small = (true[:, 2:] - true[:, :2]).max(1) < 40
    table = compare_modes(*(a[small] for a in (predicted, true, sides, images)),
                          draws=50).set_index("mode")["Pr@0.5"]
    assert (table.vrsbench > table.standard + 0.05 and table.rsthinker > table.standard + 0.05
            and table.lqvg == pytest.approx(table.standard, abs=0.01))


@pytest.mark.parametrize("change, message", [
    (lambda p, t, s, i: (p[:0], t[:0], s[:0], i[:0]), "no predictions"),
    (lambda p, t, s, i: (p[:5], t, s, i), "predicted has shape"),
    (lambda p, t, s, i: (p, t, s, i[:5]), "images has shape"),
    (lambda p, t, s, i: (np.where(np.arange(4) == 2, np.nan, t), t, s, i), "row 0: predicted"),
    (lambda p, t, s, i: (t * np.inf, t, s, i), "row 0: predicted"),
    (lambda p, t, s, i: (p, np.where(np.arange(9)[:, None] == 3, np.nan, t), s, i), "row 3: true box"),
    (lambda p, t, s, i: (p, t, s * 0, i), "row 0: side")])
def test_arrays_that_cannot_be_scored_are_refused(change, message):
    with pytest.raises(ValueError, match=message): compare_modes(*change(*simulated(9, 3, 0)))


def test_an_unknown_mode_is_refused_with_the_known_ones():
    with pytest.raises(ValueError, match="unknown mode 'voc': use one of standard, lqvg"):
        compare_modes(*simulated(9, 3, 0), modes=["voc"])


# ---- prediction files

def dataset(**changes):
    """Three expressions on two images of 100 x 50."""
    columns = dict(expression_id=["a", "b", "c"], image_id=["1.jpg", "1.jpg", "2.jpg"],
                   expression=["the left ship", "the red car", "a dam"],
                   box=[[0.0, 0, 10, 10], [20.0, 20, 40, 40], [50.0, 10, 100, 50]], width=[100] * 3,
                   height=[50] * 3)
    return Dataset.from_dict({**columns, **changes})


GOOD = ['{"expression_id": "a", "predicted": [0, 0, 10, 10]}', '{"expression_id": "b", "predicted": [20, 20, '
        '40, 30], "answer": "é\u2028"}', '{"expression_id": "c", "predicted": null}']


def written(folder, lines, ending="\n"):
    path = folder / "p.jsonl"
    path.write_bytes(lines if isinstance(lines, bytes) else "".join(line + ending for line in lines).encode())
    return path


def test_a_file_is_scored_as_worked_out_by_hand(tmp_path):
    modes, groups = evaluate_file(written(tmp_path, GOOD), dataset(), draws=50)
    row = modes.set_index("mode").loc["standard"]
    assert (row.N, row.images, row.missing) == (3, 2, 0)
    assert [row[f"Pr@{t}"] for t in FIVE] == pytest.approx([2 / 3, 1 / 3, 1 / 3, 1 / 3, 1 / 3])
    assert (row.meanIoU, row.cumIoU, row.unparsable) == pytest.approx((1.5 / 3, 300 / 2500, 1 / 3))
    assert (groups.groupby("stratum").N.sum().to_dict() == {"size": 3, "cell": 3, "cue": 3, "crowding": 3}
            and groups.few.all() and groups["Pr@0.5_low"].isna().all())


@pytest.mark.parametrize("content", ["".join(line + "\n" for line in GOOD).encode("utf-8-sig"),
                                     "".join(line + "\r\n" for line in GOOD).encode(),
                                     "\n".join(GOOD).encode(), ("\n\n".join(GOOD) + "\n \n").encode(),
                                     "".join(line + "\n" for line in reversed(GOOD)).encode()],
                         ids=["BOM", "CRLF", "no last line feed", "blank lines", "other order"])
def test_harmless_forms_of_a_file_score_the_same(tmp_path, content):
    plain = evaluate_file(written(tmp_path, GOOD), dataset(), draws=20)
    for a, b in zip(plain, evaluate_file(written(tmp_path, content), dataset(), draws=20)):
        pd.testing.assert_frame_equal(a, b)


@pytest.mark.parametrize("line, problem", [
    ("{", "not JSON"), ("[1, 2]", "not a JSON object"), ("7", "not a JSON object"),
    ("null", "not a JSON object"), ("[" * 200_000, "nested too deeply"),
    ('{"a":' * 200_000, "nested too deeply"),
    ('{"predicted": null}', "no 'expression_id'"), ('{"expression_id": "a"}', "no 'predicted'"),
    ('{"expression_id": 7, "predicted": null}', "expression_id is not text"),
    ('{"expression_id": "a", "predicted": [1, 2, 3]}', "predicted is not four finite numbers"),
    ('{"expression_id": "a", "predicted": [1, 2, 3, 4, 5]}', "predicted is not four"),
    ('{"expression_id": "a", "predicted": ["1", "2", "3", "4"]}', "predicted is not four"),
    ('{"expression_id": "a", "predicted": [1, 2, 3, true]}', "predicted is not four"),
    ('{"expression_id": "a", "predicted": [1, 2, 3, null]}', "predicted is not four"),
    ('{"expression_id": "a", "predicted": "1 2 3 4"}', "predicted is not four"),
    ('{"expression_id": "a", "predicted": [1, 2, 3, NaN]}', "NaN is not a number that JSON knows"),
    ('{"expression_id": "a", "predicted": [1, 2, 3, -Infinity]}', "-Infinity is not"),
    ('{"expression_id": "a", "predicted": [1, 2, 3, 1e400]}', "predicted is not four"),
    ('{"expression_id": "a", "predicted": [1, 2, 3, 1' + "0" * 400 + "]}", "predicted is not four"),
    ('{"expression_id": "a", "predicted": [1, 2, 3, 1' + "0" * 5000 + "]}", "digits"),
    ('{"expression_id": "a", "predicted": null, "predicted": [1, 2, 3, 4]}', "same key occurs twice"),
    ('{"expression_id": "a", "predicted": null, "box": [0, 0, 10]}', "box is not four"),
    ('{"expression_id": "a", "predicted": null, "box": [0, 0, 10, 11]}',
     "box is .* in the data .* made for other data"),
    ('{"expression_id": "a", "predicted": null, "image_id": "2.jpg"}',
     "image_id is '2.jpg', in the data '1.jpg'"),
    ('{"expression_id": "d", "predicted": null}', "'d' is not in the data"),
    ('{"expression_id": "b", "predicted": null}', "'b' again, first on line 1")])
def test_a_bad_line_is_named(tmp_path, line, problem):
    with pytest.raises(ValueError, match=f"line 3: .*{problem}"):
        load_predictions(written(tmp_path, [GOOD[1], GOOD[2], line]), dataset())


def test_bytes_that_are_not_text_are_named(tmp_path):
    with pytest.raises(ValueError, match="line 2: not UTF-8"):
        load_predictions(written(tmp_path, GOOD[0].encode() + b"\n\xff\xfe{}\n"))


@pytest.mark.parametrize("content", [b"", b"\n\n", b"\xef\xbb\xbf"])
def test_an_empty_file_is_an_error_whatever_is_allowed(tmp_path, content):
    with pytest.raises(ValueError, match="the file is empty"):
        load_predictions(written(tmp_path, content), dataset(), allow_missing=True, allow_duplicates=True,
                         allow_unknown=True)


def test_missing_ids_are_an_error_or_count_as_unparsable(tmp_path):
    path = written(tmp_path, GOOD[:1])
    with pytest.raises(ValueError, match="2 of 3 ids of the data have no valid line: b, c"):
        evaluate_file(path, dataset())
    row = evaluate_file(path, dataset(), allow_missing=True, draws=20)[0].iloc[0]
    assert (row.N, row.missing, row.unparsable, row.meanIoU) == (3, 2, pytest.approx(2 / 3),
                                                                 pytest.approx(1 / 3))


def test_of_allowed_duplicates_the_last_counts(tmp_path):
    path = written(tmp_path, ['{"expression_id": "a", "predicted": [50, 50, 60, 60]}', *GOOD])
    with pytest.raises(ValueError, match="line 2: expression_id 'a' again, first on line 1"):
        evaluate_file(path, dataset())
    again = evaluate_file(path, dataset(), allow_duplicates=True, draws=20)
    for a, b in zip(again, evaluate_file(written(tmp_path, GOOD), dataset(), draws=20)):
        pd.testing.assert_frame_equal(a, b)


def test_allowed_unknown_ids_are_left_out(tmp_path):
    path = written(tmp_path, [*GOOD, '{"expression_id": "z", "predicted": null}'])
    with pytest.raises(ValueError, match="line 4: expression_id 'z' is not in the data"):
        load_predictions(path, dataset())
    assert [p["expression_id"] for p in load_predictions(path, dataset(), allow_unknown=True)] == ["a", "b",
                                                                                                   "c"]


def test_all_problems_are_counted_and_ten_are_told(tmp_path):
    path = written(tmp_path, ["{"] * 30)
    with pytest.raises(ValueError) as error: load_predictions(path, dataset())
    told = str(error.value).splitlines()
    assert (told[0] == f"{path}: 31 problems" and told[2].startswith("  line 1: not JSON")
            and told[-1] == "  ... and 21 more" and len(told) == 12)
    assert len(check_predictions(path, dataset())[1]) == 31


def test_without_data_the_file_keeps_its_order(tmp_path):
    assert [p["expression_id"] for p in load_predictions(written(tmp_path, GOOD[::-1]))] == ["c", "b", "a"]


def test_data_that_cannot_tell_expressions_apart_are_refused(tmp_path):
    with pytest.raises(ValueError, match="'a' more than once"):
        evaluate_file(written(tmp_path, GOOD), dataset(expression_id=["a", "a", "c"]))


def test_swapped_corners_are_answered_and_wrong(tmp_path):
    row = evaluate_file(written(tmp_path, ['{"expression_id": "a", "predicted": [10, 10, 0, 0]}', *GOOD[1:]]),
                        dataset(), draws=20)[0].iloc[0]
    assert (row.no_area, row.unparsable, row.meanIoU) == pytest.approx((1 / 3, 1 / 3, 0.5 / 3))


json_values = st.recursive(st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
                           lambda inner: st.lists(inner, max_size=5)
                           | st.dictionaries(st.text(), inner, max_size=4), max_leaves=8)


@settings(max_examples=100, deadline=None)
@given(st.lists(st.binary(max_size=40) | json_values.map(lambda v: json.dumps(v).encode())
                | st.fixed_dictionaries(dict(expression_id=st.sampled_from("abcd") | json_values,
                                             predicted=json_values
                                             | st.lists(st.floats(-10, 200), min_size=4, max_size=4)))
                .map(lambda v: json.dumps(v).encode()), max_size=6))
@example([b'{"expression_id": "a", "predicted": Infinity}'])
@example([b'{"expression_id": "a", "expression_id": "b"}'])
@example([b"PK\x03\x04"])
@example([b"[", b'{"expression_id": NaN}]'])
def test_any_bytes_give_predictions_or_problems_and_never_another_error(tmp_path_factory, lines):
    path = written(tmp_path_factory.mktemp("any"), b"\n".join(lines))
    try: found, problems = check_predictions(path, dataset())
    # the whole file is no text, or one broken list
    except ValueError as e: assert str(path) in str(e); return
    assert list(found) == ["a", "b", "c"] and (problems or not any("missing" in p for p in found.values()))


def test_what_is_written_is_read_back_and_accepted(tmp_path):
    rows = dataset()
    made = [dict(expression_id=e, image_id=i, expression=x, box=b, answer="<answer>\u2028\x85</answer>",
                 predicted=b, reason="ok", iou=1.0)
            for e, i, x, b in zip(rows["expression_id"], rows["image_id"], rows["expression"], rows["box"])]
    write_predictions(made, tmp_path / "p.jsonl")
    assert read_predictions(tmp_path / "p.jsonl") == made == load_predictions(tmp_path / "p.jsonl", rows)
    random.Random(0).shuffle(made)
    write_predictions(made, tmp_path / "p.jsonl")
    row = evaluate_file(tmp_path / "p.jsonl", rows, draws=20)[0].iloc[0]
    old = score(read_predictions(tmp_path / "p.jsonl"))
    assert (row["N"], row["Pr@0.5"], row["Pr@0.7"], row["meanIoU"],
            row["unparsable"]) == (old["N"], old["Acc@0.5"], old["Acc@0.7"], old["mIoU"], old["unparsable"])


# ---- files of other shapes

def test_one_json_list_is_read_like_lines(tmp_path):
    items = [json.loads(line) for line in GOOD]
    plain = evaluate_file(written(tmp_path, GOOD), dataset(), draws=20)
    for text in (json.dumps(items), json.dumps(items, indent=2),
                 "\ufeff\n" + json.dumps(items, indent=1) + "\n"):
        for a, b in zip(plain, evaluate_file(written(tmp_path, text.encode()), dataset(), draws=20)):
            pd.testing.assert_frame_equal(a, b)
    with pytest.raises(ValueError, match="item 4: expression_id 'a' again, first on item 1"):
        load_predictions(written(tmp_path, json.dumps(items + items[:1]).encode()), dataset())
    with pytest.raises(ValueError, match="item 3: predicted is not four"):
        load_predictions(written(tmp_path, json.dumps(items[:2] + [{"expression_id": "c", "predicted": "no"}],
                                                      indent=1).encode()), dataset())


@pytest.mark.parametrize("content, said", [
    (b"PK\x03\x04abc", "is a zip file: unpack it"), (b"\x1f\x8babc", "packed with gzip: unpack it"),
    (GOOD[0].encode("utf-16"), "UTF-16: save it as UTF-8"), (b"PAR1abc", "Parquet"),
    (json.dumps([json.loads(line) for line in GOOD], indent=1)[:-30].encode(), "broken or cut off: .*line"),
    (json.dumps({"a": [1, 2, 3, 4]}, indent=1).encode(),
     "one JSON object: one object per prediction is needed"),
    (json.dumps([[1, 2, 3, 4]], indent=1).encode(), "one JSON list without objects"),
    (b'[\n{"a": "\xff"}\n]', "not UTF-8")])
def test_what_is_no_prediction_file_is_named_in_one_sentence(tmp_path, content, said):
    with pytest.raises(ValueError, match=said) as error:
        load_predictions(written(tmp_path, content), dataset())
    assert "\n" not in str(error.value)


def test_a_folder_a_missing_file_and_a_pipe_are_named_and_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    for name, said in (("", "is a folder"), ("none.jsonl", "there is no prediction file"),
                       ("pipe", "not a regular file")):
        with pytest.raises(ValueError, match=said): load_predictions(tmp_path / name, dataset())


# ---- predictions in another frame

def in_frames(width, height, n=30):
    """frame -> the same boxes, 3 % of the side off the truth; rows."""
    rng = np.random.default_rng(0)
    start = rng.uniform(0, 0.75, (n, 2))
    shares, sides = np.hstack([start, start + rng.uniform(0.1, 0.25, (n, 2))]), np.tile([width, height], 2)
    pixels = shares * sides
    rows = dataset(**{c: [f"{c}{k}" for k in range(n)] for c in ("expression_id", "image_id", "expression")},
                   box=(pixels + 0.01 * sides).tolist(), width=[width] * n, height=[height] * n)
    return {"pixel": pixels, "shares": shares, "percent": 100 * shares, "thousandths": 1000 * shares,
            "qwen3_vl": 1000 * shares, "deepseek_vl2": 999 * shares, "vrsbench": 100 * shares,
            "xywh": np.hstack([pixels[:, :2], pixels[:, 2:] - pixels[:, :2]])}, rows


@pytest.mark.parametrize("width, height", [(800, 800), (112, 112), (1024, 768), (3000, 4000)])
def test_predictions_in_another_frame_are_said_and_read_with_its_name(tmp_path, width, height):
    frames, rows = in_frames(width, height)
    def scored(boxes, frame="pixel"):
        write_predictions([dict(expression_id=e, predicted=b)
                           for e, b in zip(rows["expression_id"], [*boxes[:-1].tolist(), None])],
                          tmp_path / "p.jsonl")
        return evaluate_file(tmp_path / "p.jsonl", rows, draws=2, frame=frame)[0].iloc[0]
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        right = scored(frames["pixel"])
        for name, boxes in frames.items():
            assert scored(boxes, name).meanIoU == pytest.approx(right.meanIoU), name
        scored(frames["pixel"][::-1])  # wrong everywhere, in pixels: nothing to say
    for name in ("shares", "percent", "thousandths", "xywh"):
        with pytest.warns(UserWarning, match="look like .*not like pixels: mean IoU 0.* as pixels, "
                          f"{right.meanIoU * 30 / 29:.3f} in that frame; .*--frame {name}"):
            assert scored(frames[name]).meanIoU < right.meanIoU / 2


def test_shares_are_said_even_if_they_hit_nothing(tmp_path):
    with pytest.warns(UserWarning, match="shares of the sides .0 to 1.*--frame shares"):
        evaluate_file(written(tmp_path, ['{"expression_id": "%s", "predicted": [0.9, 0.1, 0.95, 0.15]}' % e
                                         for e in "abc"]), dataset(), draws=2)
    with pytest.raises(ValueError, match="unknown frame 'yolo': use one of pixel, shares"):
        evaluate_file(written(tmp_path, GOOD), dataset(), draws=2, frame="yolo")
    assert {"pixel", "qwen2_5_vl", "geochat"} < set(FRAME_NAMES)


def test_the_command_says_the_frame_and_every_mistake_in_one_line(shared, tmp_path, capsys):
    from rsground_nb.run import main

    rows, data = (load_folder(shared / "aerial_mini")[0]["test"].remove_columns("image"),
                  str(shared / "aerial_mini"))
    path = tmp_path / "p.json"
    path.write_text(json.dumps([dict(expression_id=r["expression_id"], predicted=[
        v / s for v, s in zip(r["box"], (r["width"], r["height"]) * 2)]) for r in rows]))
    assert main(["evaluate", str(path), "--data", data]) == 0 and "--frame shares" in capsys.readouterr().err
    assert main(["evaluate", str(path), "--data", data, "--frame", "shares", "--out",
                 str(tmp_path / "tables")]) == 0 and capsys.readouterr().err == ""
    assert (pd.read_csv(tmp_path / "tables" / "modes.csv").set_index("mode").meanIoU["standard"]
            == pytest.approx(1))
    (tmp_path / "p.zip").write_bytes(b"PK\x03\x04")
    for words, said in (([str(tmp_path / "p.zip")], "a zip file: unpack it"),
                        ([str(tmp_path)], "is a folder"), (["none.jsonl"], "there is no prediction file"),
                        ([str(path), "--seed", "-1"], "--seed -1"),
                        ([str(path), "--frame", "yolo"], "unknown frame 'yolo'")):
        assert main(["evaluate", *words, "--data", data]) == 2
        error = capsys.readouterr().err
        assert said in error and error.count("\n") == 1 and "Errno" not in error


# ---- strata

def test_groups_of_three_rows_worked_out_by_hand():
    groups = strata(dataset())
    # sqrt(100 / 5000) = 0.14
    assert {row: {c for c in groups.columns if groups[c][row]} for row in range(3)} == {
        # sqrt(100 / 5000) = 0.14
        0: {("size", "medium (10-20 %)"), ("cell", "top left"), ("cue", "position"),
            ("crowding", "2-3 boxes")},
        # sqrt(400 / 5000) = 0.28; x 30 of 100, y 30 of 50
        1: {("size", "large (>= 20 %)"), ("cell", "left"), ("cue", "colour"), ("crowding", "2-3 boxes")},
        2: {("size", "large (>= 20 %)"), ("cell", "right"), ("cue", "none"), ("crowding", "1 box")}}


def test_the_edges_of_size_and_crowding_belong_to_one_side():
    boxes = [[0.0, 0, side, side] for side in (4.9, 5, 9.9, 10, 19.9, 20)]
    rows = Dataset.from_dict(dict(expression_id=list("abcdef"), image_id=list("123456"), expression=["x"] * 6,
                                  box=boxes, width=[100] * 6, height=[100] * 6))
    assert strata(rows)["size"].to_numpy().argmax(1).tolist() == [0, 1, 1, 2, 2, 3]
    counts = [1, 2, 3, 4, 7, 8]
    # a box annotated twice is one box
    many = [(f"{n}:{k}", str(n), [float(k), 0, k + 1.0, 1]) for n in counts for k in range(n)] + [
        ("again", "1", [0.0, 0, 1, 1])]
    rows = Dataset.from_dict(dict(expression_id=[m[0] for m in many], image_id=[m[1] for m in many],
                                  expression=["x"] * len(many), box=[m[2] for m in many],
                                  width=[100] * len(many), height=[100] * len(many)))
    assert strata(rows)["crowding"].sum().tolist() == [1 + 1, 2 + 3, 4 + 7, 8]


@settings(max_examples=50, deadline=None)
@given(st.lists(st.tuples(*[st.floats(-10, 110)] * 4), min_size=1, max_size=5), st.integers(1, 120),
       st.integers(1, 120))
def test_cells_are_the_regions_of_the_grammar(boxes, width, height):
    n = len(boxes)
    rows = Dataset.from_dict(dict(expression_id=[str(k) for k in range(n)], image_id=["1"] * n,
                                  expression=["x"] * n, box=[list(b) for b in boxes], width=[width] * n,
                                  height=[height] * n))
    cells = strata(rows)["cell"]
    assert ([cells.columns[k] for k in cells.to_numpy().argmax(1)]
            == [region(b, width, height) for b in boxes] and (cells.sum(axis=1) == 1).all())


@pytest.mark.parametrize("expression, types", [
    ("the ship on the left", {"position"}), ("the leftmost ship", {"order"}),
    ("the upper right plane", {"position"}), ("a dam on the left of the image", {"position"}),
    ("the ship left of the dam", {"relation"}),
    ("the car on the right side of the white truck", {"relation", "colour"}),
    ("the second tank from the right", {"order"}), ("the largest tank", {"size"}),
    ("A SMALL vehicle", {"size"}),
    ("the plane above the blue vehicle", {"relation", "colour"}), ("the gray and the grey one", {"colour"}),
    ("furthest to the left", {"order"}), ("the ship next to the smallest pier", {"relation", "size"}),
    ("the plane in the centre", {"position"}), ("the windmill", {"none"}),
    ("the lefty colourless topping", {"none"}), ("", {"none"})])
def test_words_are_sorted_into_kinds_of_cues(expression, types): assert cue_types(expression) == types


def test_every_cue_word_has_a_kind_but_only():
    words = ("top left", "lower right", "leftmost", "topmost", "largest", "smallest", "middle", "center",
             "nearest to", "closest to", "next to", "left of", "right of", "above", "below", "between",
             "furthest to the right", "left", "bottom", "second", "fourth")
    for word in words: assert cues(word) and cue_types(word) != {"none"}, word


def test_a_group_on_few_images_has_numbers_but_no_interval():
    made = (*simulated(100, 40, 0)[:3], np.arange(100) % 40)
    members = pd.DataFrame({("half", "all"): np.ones(100, bool), ("half", "nine images"): made[3] < 9,
                            ("half", "ten images"): made[3] < 10, ("half", "nobody"): np.zeros(100, bool)})
    table = score_strata(*made, members, draws=300).set_index("group")
    assert table.few.to_dict() == {"all": False, "nine images": True, "ten images": False, "nobody": True}
    assert (table.N["nobody"] == 0 and np.isnan(table.meanIoU["nobody"])
            and np.isnan(table.meanIoU_low["nine images"]) and table.meanIoU["nine images"] > 0)
    assert table.meanIoU_low["ten images"] < table.meanIoU["ten images"] < table.meanIoU_high["ten images"]
    whole = compare_modes(*made, modes=["standard"], draws=300).iloc[0]
    assert [table[c]["all"] for c in ("meanIoU", "meanIoU_low", "meanIoU_high")] == pytest.approx(
        [whole[c] for c in ("meanIoU", "meanIoU_low", "meanIoU_high")])


def test_a_partition_adds_up_to_the_whole():
    made = simulated(100, 40, 0)
    odd = np.arange(100) % 2 == 1
    table = score_strata(*made, pd.DataFrame({("parity", "odd"): odd, ("parity", "even"): ~odd}), mode="lqvg",
                         draws=20)
    whole = compare_modes(*made, modes=["lqvg"], draws=20).iloc[0]
    assert ((table.N * table.meanIoU).sum() / 100 == pytest.approx(whole.meanIoU)
            and (table.N * table["Pr@0.5"]).sum() / 100 == pytest.approx(whole["Pr@0.5"]))


# ---- masks

def mask(x1, y1, x2, y2, side=10):
    found = np.zeros((side, side), bool)
    found[y1:y2, x1:x2] = True
    return encode_mask(found)


def test_masks_worked_out_by_hand():
    """Pixels in common / in the union: 16/16, 8/16, 4/28, 0/32, none answered 0/16, both empty 0/0."""
    true = [mask(0, 0, 4, 4)] * 5 + [mask(0, 0, 0, 0)]
    predicted = [mask(0, 0, 4, 4), mask(0, 0, 2, 4), mask(2, 2, 6, 6), mask(5, 5, 9, 9), None,
                 mask(0, 0, 0, 0)]
    found = mask_metrics(predicted, true, list("aabbcd"), draws=100)
    assert found["N"] == 6 and found["missing"] == pytest.approx(1 / 6)
    assert (found["mIoU"] == pytest.approx((1 + 1 / 2 + 1 / 7) / 6)
            and found["oIoU"] == pytest.approx(28 / 108))
    assert [found[f"Pr@{t}"] for t in FIVE] == pytest.approx([2 / 6, 1 / 6, 1 / 6, 1 / 6, 1 / 6])
    assert all(found[f"{name}_low"] <= found[name] <= found[f"{name}_high"]
               for name in ("mIoU", "oIoU", "Pr@0.5"))


@settings(max_examples=50, deadline=None)
@given(st.integers(1, 9), st.integers(1, 9), st.integers(0, 10_000))
def test_mask_areas_equal_counting_pixels(height, width, seed):
    a, b = np.random.default_rng(seed).random((2, height, width)) < 0.5
    assert read_mask(encode_mask(a))["size"] == [height, width]
    found = mask_metrics([encode_mask(a)], [encode_mask(b)], ["1"], draws=5)
    assert found["mIoU"] == pytest.approx((a & b).sum() / max(1, (a | b).sum()))


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 400), st.integers(1, 400), st.integers(0, 10_000))
def test_run_lengths_of_any_mask_pass_the_check(height, width, seed):
    rng = np.random.default_rng(seed)
    read_mask(encode_mask(rng.random((height, width)) < rng.choice([0, 0.001, 0.1, 0.5, 1])))


@pytest.mark.parametrize("text", ['{"size": [5, 5], "counts": "0"}',
                                  '{"size": [5, 5], "counts": ""}', '{"size": [5, 5], "counts": "zzzzzz"}',
                                  '{"size": [5, 5], "counts": "PPPPPPPPPPPPPPPPPPPPPPPPPPPPP"}',
                                  '{"size": [5, 5], "counts": "P"}', '{"size": [5, 5], "counts": "!!"}',
                                  '{"size": [5, 5], "counts": "\u00e9"}',
                                  '{"size": [-5, -5], "counts": "i0"}', '{"size": [5, true], "counts": "50"}',
                                  '{"size": [100000, 100000], "counts": "0"}', '{"size": [5], "counts": "0"}',
                                  '{"size": [5, 5]}', "[1]", "", "no", '{"size": [5, 5], "counts": [25]}',
                                  "[" * 200_000])
def test_broken_run_lengths_never_reach_pycocotools(text):
    with pytest.raises(ValueError, match="b: "):
        mask_metrics([mask(0, 0, 1, 1, 5), text], [mask(0, 0, 1, 1, 5)] * 2, ["1", "2"], ids=["a", "b"])


def test_masks_of_different_size_are_refused_by_id():
    with pytest.raises(ValueError, match="b: the predicted mask is 9x9, the true one 10x10"):
        mask_metrics([mask(0, 0, 1, 1), mask(0, 0, 1, 1, 9)], [mask(0, 0, 1, 1)] * 2, ["1", "2"],
                     ids=["a", "b"])
    with pytest.raises(ValueError, match="1 predicted masks, 2 true ones"):
        mask_metrics([None], [mask(0, 0, 1, 1)] * 2, ["1", "2"])
    with pytest.raises(ValueError, match="no predictions"): mask_metrics([], [], [])


# ---- answers that need no model

def rows_of(*found):
    """(expression, box) in images of 100 x 50; the other object of each picture is the whole upper half."""
    return to_dataset([dict(expression=e, box=list(b),
                            width=100, height=50, image_id=str(k), expression_id=str(k),
                            objects=[dict(category="ship", colour="red", box=list(b)),
                                     dict(category="tank", colour="red", box=[0, 0, 100, 25])])
                       for k, (e, b) in enumerate(found)])


def test_words_alone_answers_with_the_central_box_of_the_same_cue():
    left, middle, right = (0, 20, 10, 30), (45, 20, 55, 30), (90, 20, 100, 30)
    train = rows_of(("the leftmost ship", left), ("the leftmost tank", left), ("the rightmost ship", right),
                    ("the ship", middle), ("the ship", middle), ("the tank", middle))
    found = words_alone(train, rows_of(("the leftmost red plane", left), ("the rightmost plane", right),
                                       ("the topmost plane", middle), ("the blue plane", middle)))
    for prediction, box in zip(found, (left, right, middle, middle), strict=True):
        assert prediction["predicted"] == pytest.approx(box) and prediction["iou"] == pytest.approx(1)


def test_the_largest_object_is_the_largest_and_needs_all_objects():
    rows = rows_of(("the ship", (0, 30, 10, 40)))
    assert largest_object(rows)[0]["predicted"] == [0, 0, 100, 25] and set(without_model(rows, rows)) == {
        "constant guess", "random box", "words alone", "largest object"}
    unknown = to_dataset([{**r, "objects": None} for r in rows.remove_columns("image")])
    assert "largest object" not in without_model(rows, unknown)
    with pytest.raises(ValueError, match="needs the column `objects`"): largest_object(unknown)


def test_random_boxes_are_training_boxes_as_shares():
    train, test = rows_of(("a", (0, 0, 50, 50)), ("b", (50, 0, 100, 25))), to_dataset(
        [dict(expression="c", box=[0, 0, 1, 1], width=10, height=10, image_id="c", expression_id="c")] * 40)
    assert {tuple(p["predicted"]) for p in random_boxes(train, test)} == {(0, 0, 5, 10), (5, 0, 10, 5)}


@given(st.lists(st.tuples(*[st.integers(0, 20)] * 2, *[st.integers(1, 9)] * 2), min_size=1, max_size=12))
def test_the_central_box_has_the_highest_mean_iou(corners):
    boxes = np.array([(x, y, x + w, y + h) for x, y, w, h in corners], float)
    best = central(boxes)
    means = [np.mean([iou(a, b) for b in boxes]) for a in boxes]
    assert np.mean([iou(best, b) for b in boxes]) == pytest.approx(max(means))


# ---- a folder from disk

def test_the_truth_of_a_folder_scores_1_under_every_mode_and_its_mean_box_does_not(shared, tmp_path):
    splits, _ = load_folder(shared / "aerial_mini")
    rows = splits["test"]
    write_predictions([dict(expression_id=e, predicted=b)
                       for e, b in zip(rows["expression_id"], rows["box"])], tmp_path / "truth.jsonl")
    modes, groups = evaluate_file(tmp_path / "truth.jsonl", rows, draws=50)
    assert ((modes.N == len(rows)).all() and modes["Pr@0.5"].eq(1).all()
            and modes.meanIoU.to_numpy() == pytest.approx(np.ones(len(MODES))))
    guess = [dict(expression_id=e, predicted=list(p["predicted"]))
             for e, p in zip(rows["expression_id"], constant_guess(splits["train"], rows))]
    write_predictions(guess, tmp_path / "guess.jsonl")
    assert evaluate_file(tmp_path / "guess.jsonl", rows, draws=50)[0].meanIoU.max() < 0.9
    assert groups[groups.stratum != "cue"].groupby("stratum").N.sum().eq(len(rows)).all()


def test_the_command_scores_a_file_and_refuses_one_for_other_data(shared, tmp_path, capsys):
    from rsground_nb.run import main

    splits, _ = load_folder(shared / "aerial_mini")
    path, data = tmp_path / "p.jsonl", str(shared / "aerial_mini")
    write_predictions([dict(expression_id=r["expression_id"], predicted=r["box"])
                       for r in splits["test"].remove_columns("image")], path)
    assert main(["evaluate", str(path), "--data", data, "--out", str(tmp_path / "tables")]) == 0
    assert "f7d46fe6bd3fbe9be577cb613e7ce5da1789a46a1a72c9c8cc16b81ea57c1e26" in capsys.readouterr().out
    table = pd.read_csv(tmp_path / "tables" / "modes.csv")
    assert ((table.meanIoU > 0.999).all() and (table["Pr@0.5"] == 1).all() and table.N.eq(70).all()
            and table.split.eq("test").all())
    assert main(["evaluate", str(path), "--data", data, "--split", "val"]) == 2
    assert "44 of 44 ids of the data have no valid line" in capsys.readouterr().err
    assert (main(["evaluate", str(path), "--data", data, "--split", "best"]) == 2
            and "no split 'best'" in capsys.readouterr().err)
    assert main(["evaluate", str(path), "--data", data, "--out", str(tmp_path / "tables")]) == 2


@pytest.mark.parametrize("text", ['{"size":[4,6],"counts":"9220003P"}', '{"size":[70000,70000],"counts":"0"}',
                                  '{"size":[4,6],"counts":""}', '{"size":[4,6]}', '[]', '5',
                                  '{"size":[4,6],"counts":7}', '{"size":[4.0,6],"counts":"0"}'])
def test_a_text_that_is_no_mask_never_reaches_pycocotools(text):
    with pytest.raises(ValueError): read_mask(text)


def test_an_empty_mask_has_no_box_however_it_is_written():
    from rsground_nb.shapes import mask_box, run_lengths

    for counts, runs in (("h0", [24]), ("h00", [24, 0]), ("<0<", [12, 0, 12])):
        assert run_lengths(counts) == runs and mask_box(json.dumps(dict(size=[4, 6], counts=counts))) is None
    assert (mask_box(encode_mask(np.zeros((4, 6)))) is None
            and mask_box(encode_mask(np.full((4, 6), 256))) == (0, 0, 6, 4))


def test_every_colour_word_of_the_scenes_is_a_cue():
    from rsground_nb.scenes import COLOURS, OTHER_COLOURS, TONES

    assert all("colour" in cue_types(f"the {word} ship") for word in (*COLOURS, *OTHER_COLOURS, *TONES))


def test_a_key_called_missing_in_a_file_is_not_ours(tmp_path):
    rows = Dataset.from_list([dict(expression_id="e0", image_id="a", expression="x", box=[0.0, 0, 5, 5],
                                   width=10, height=10)])
    (tmp_path / "p.jsonl").write_text('{"expression_id": "e0", "predicted": [0, 0, 5, 5], "missing": true}')
    assert evaluate_file(tmp_path / "p.jsonl", rows)[0].missing.tolist() == [0] * len(MODES)
