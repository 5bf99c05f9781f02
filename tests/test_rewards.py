import importlib
import math
import pickle
import re
import subprocess
import sys

import numpy as np
import pytest
import torch
from hypothesis import given, strategies as st

from rsground_nb.boxes import Codec, diou, giou, iou, parse_completion
from conftest import ROOT
from rsground_nb.rewards import (BoxReward, box_rewards, dious, format_reward, format_score, gious,
                                 iou_reward, ious, make_rewards, positional, text_of)
from rsground_nb.rivals import box_explorer, reward_table
from rsground_nb.train import watched

at, extent = st.floats(0, 1000), st.floats(1, 300)
boxes = st.tuples(at, at, extent, extent).map(lambda b: (b[0], b[1], b[0] + b[2], b[1] + b[3]))
readings = st.sampled_from(["center", "area"])


def one(box, target, **kwargs):
    return positional(torch.tensor([box], dtype=torch.float64), torch.tensor([target], dtype=torch.float64),
                      **kwargs).item()


@given(boxes, boxes, readings)
def test_positional_is_bounded_and_does_not_know_units(box, target, reading):
    value = one(box, target, reading=reading)
    assert 0 <= value <= 1 + 1e-12
    assert one([3.7 * v for v in box], [3.7 * v for v in target], reading=reading) == pytest.approx(value,
                                                                                                    abs=1e-9)


@given(boxes, st.floats(0, 8), st.floats(0, 8), readings)
def test_positional_falls_with_distance(target, near, more, reading):
    width = target[2] - target[0]
    moved = lambda d: one([v + d * width * (k % 2 == 0) for k, v in enumerate(target)], target,
                          reading=reading)
    assert moved(near + more) <= moved(near) + 1e-12
    if more > 0.1: assert moved(near + more) < moved(near)


@given(boxes, readings)
def test_positional_speaks_where_iou_is_silent_and_points_at_the_target(target, reading):
    width = target[2] - target[0]
    box = torch.tensor([[target[0] + 2 * width, target[1], target[2] + 2 * width, target[3]]],
                       dtype=torch.float64, requires_grad=True)
    assert iou(box[0].tolist(), target) == 0
    value = positional(box, torch.tensor([target], dtype=torch.float64), reading=reading)
    value.sum().backward()
    assert value.item() > 0 and box.grad[0, 0] + box.grad[0, 2] < 0


def test_the_table_of_the_paper_notes():
    target = (0.0, 0.0, 20.0, 20.0)
    table = {"center": [1.000, .726, .278, .056, .006, .0003], "area": [.949, .700, .282, .062, .007, .0005]}
    for reading, values in table.items():
        for d, value in enumerate(values):
            assert one((20 * d, 0, 20 * d + 20, 20), target, reading=reading) == pytest.approx(value,
                                                                                               abs=6e-4)


POINTS, WEIGHTS = np.polynomial.legendre.leggauss(1000)  # of the integral over [-1, 1]


@given(boxes, boxes, st.floats(0.5, 10))
def test_the_area_reading_is_the_mean_of_the_kernel(box, target, alpha):
    (cx, cy), (sx, sy) = ([(target[k] + target[k + 2]) / 2 for k in (0, 1)],
                          [alpha * (target[k + 2] - target[k]) / 2 for k in (0, 1)])
    def mean(lo, hi, c, s):
        return (WEIGHTS * np.exp(-((lo + (POINTS + 1) / 2 * (hi - lo) - c) ** 2) / (2 * s ** 2))).sum() / 2
    assert one(box, target, alpha=alpha, reading="area") == pytest.approx(
        mean(box[0], box[2], cx, sx) * mean(box[1], box[3], cy, sy), abs=1e-6)


BROKEN = [(5, 5, 5, 9), (9, 5, 5, 9), (0, 0, 0, 0), (math.nan,) * 4, (math.nan, 0, 5, 5),
          (-math.inf, 0, 5, math.inf), (0, 0, math.inf, 5)]


@pytest.mark.parametrize("name, lowest",
                         dict(iou=0, binary=0, giou=-1, diou=-1, distance=0, center=0, area=0).items())
def test_broken_boxes_earn_the_lowest_value_and_leave_no_gradient(name, lowest):
    said = torch.tensor([*BROKEN, (0, 0, 11, 10)], dtype=torch.float64, requires_grad=True)
    target = torch.tensor([(0.0, 0, 10, 10)] * len(said))
    for swapped in (False, True):
        value = box_rewards()[name](*((target, said) if swapped else (said, target)), 100.0)
        assert value[:-1].tolist() == [lowest] * len(BROKEN) and value[-1] > lowest
        if not value.requires_grad: continue
        slope, = torch.autograd.grad(value.sum(), said)
        assert torch.isfinite(slope).all() and (slope[:-1] == 0).all() and (slope[-1] != 0).any()


@given(boxes, boxes)
def test_many_pairs_at_once_are_the_functions_for_one_pair(a, b):
    for many, single in ((ious, iou), (gious, giou), (dious, diou)):
        assert (many(torch.tensor([a, b], dtype=torch.float64), torch.tensor([b, b], dtype=torch.float64))
                .tolist() == pytest.approx([single(a, b), single(b, b)], abs=1e-12))


@pytest.mark.parametrize("name", box_rewards())
@given(boxes, boxes, st.floats(0.1, 50))
def test_every_reward_is_bounded_does_not_know_units_and_likes_the_truth(name, box, target, scale):
    f = box_rewards()[name]
    a, b = torch.tensor([box], dtype=torch.float64), torch.tensor([target], dtype=torch.float64)
    value = f(a, b, 2000.0).item()
    assert -1 <= value <= 1 + 1e-12
    assert f(scale * a, scale * b, 2000.0 * scale).item() == pytest.approx(value, abs=1e-9)
    if name != "area": assert f(b, b, 2000.0).item() == pytest.approx(1)


def test_far_away_single_precision_is_silent_and_doubles_still_speak():
    d = 20 * 30.0
    assert torch.exp(-torch.tensor(30.0) ** 2 / (2 * 1.25 ** 2)) == 0 < one((d, 0, d + 20, 20),
                                                                            (0, 0, 20, 20))
    # also if the boxes come in single precision
    assert positional(torch.tensor([[d, 0, d + 20, 20]]), torch.tensor([[0.0, 0, 20, 20]])).item() > 0


def test_alpha_and_reading_are_checked():
    for wrong in (0, -1, math.nan):
        with pytest.raises(ValueError, match="above 0"): one((0, 0, 1, 1), (0, 0, 1, 1), alpha=wrong)
    with pytest.raises(ValueError, match="unknown reading"): one((0, 0, 1, 1), (0, 0, 1, 1), reading="middle")


@pytest.mark.parametrize("third, name", dict(center="positional", area="positional", giou="giou", diou="diou",
                                             distance="distance", binary="binary").items())
def test_the_third_reward_can_be_any_of_the_rivals(third, name):
    said = ["<think>Here.</think><answer>[50, 40, 70, 60]</answer>", "no box"]
    given = dict(box=[[40, 40, 60, 60]] * 2, width=[1000] * 2, height=[500] * 2)
    last = make_rewards(Codec(), third=third)[2]
    value = box_rewards()[third](torch.tensor([[50.0, 40, 70, 60]]), torch.tensor([[40.0, 40, 60, 60]]),
                                 math.hypot(1000, 500)).item()
    assert last.__name__ == f"{name}_reward"
    assert last(said, **given) == pytest.approx([value, -1 if third in ("giou", "diou") else 0])


def test_an_unknown_third_reward_is_refused():
    with pytest.raises(ValueError, match="unknown reward 'middle': use one of iou, binary"):
        make_rewards(Codec(), third="middle")


def test_a_name_in_place_of_a_codec_is_refused():
    with pytest.raises(ValueError, match="not a codec: 'qwen2_5_vl'; use codec_of"):
        make_rewards("qwen2_5_vl")


def test_the_slopes_of_the_table_are_those_of_small_steps():
    box, target, step = (44.0, 41, 66, 60), (40.0, 40, 60, 60), 1e-4
    table = reward_table(box, target, (200, 100), alpha=2, beta=0.3)
    moves = dict(right=(1, 0, 1, 0), down=(0, 1, 0, 1), wider=(-0.5, 0, 0.5, 0), taller=(0, -0.5, 0, 0.5))
    for column, move in moves.items():
        ahead, behind = (reward_table([v + s * step * m for v, m in zip(box, move)], target, (200, 100),
                                      alpha=2, beta=0.3).value for s in (1, -1))
        assert table[column].tolist() == pytest.approx(((ahead - behind) / (2 * step)).tolist(), abs=1e-6)
    assert table.value["iou + beta center"] == pytest.approx(table.value["iou"] + 0.3 * table.value["center"])


def test_the_explorer_shows_the_table_of_the_box_that_was_set():
    from PIL import Image

    picture, right = box_explorer(Image.new("RGB", (100, 80)), (40, 30, 60, 50)).children
    x, y, alpha, beta, table = right.children
    assert x.value == (40, 60) and y.value == (30, 50) and "<td>0.2500</td>" not in table.value
    before = picture.value
    x.value, y.value, alpha.value, beta.value = (45, 55), (35, 45), 5, 0.5
    assert picture.value != before and bytes(picture.value).startswith(b"\x89PNG")
    assert table.value == (reward_table((45, 35, 55, 45), (40, 30, 60, 50), (100, 80), 5, 0.5).round(4)
                           + 0.0).to_html(float_format="{:.4f}".format)
    assert "<td>0.2500</td>" in table.value  # half the sides
    x.value = (50, 50)  # no area: defined
    assert "nan" not in table.value.lower()


GOOD = "<think>It is at the left.</think><answer>[1, 2, 30, 40]</answer>"


@pytest.mark.parametrize("text, score", [
    (GOOD, 1), ("\n" + GOOD + "\n", 1), (GOOD + " Done!", 0), (GOOD + GOOD, 0), ("", 0),
    ("<answer>[1, 2, 30, 40]</answer>", 0), (GOOD.replace("It is at the left.", " "), 0),
    (GOOD.replace("[1, 2, 30, 40]", "[30, 2, 1, 40]"), 0), (GOOD.replace("at", "at < 3 px"), 1),
    (GOOD.replace("at", "at <b>the</b>"), 1), (GOOD.replace("at", "at <think>the"), 0),
    (GOOD.replace("at", "at </answer>"), 0)])
def test_the_form(text, score):
    assert format_score(text) == score


@given(st.text())
def test_the_format_score_never_fails(text): assert format_score(text) in (0.0, 1.0)


@pytest.mark.parametrize("answer", ["[[4, 8, 20, 16]]", '{"bbox_2d": [4, 8, 20, 16]}', "{<4><8><20><16>}",
                                    "(4,8),(20,16)", "［4, 8, 20, 16］", "[４, 8, 20, 16]", "[4, 8, 2e1, 16]",
                                    "[+4, 8, 20, 16]", "Here: [4, 8, 20, 16]"])
def test_what_is_understood_is_not_yet_well_formed(answer):
    text = f"<think>At the left.</think><answer>{answer}</answer>"
    assert parse_completion(text).box == (4, 8, 20, 16) and format_score(text) == 0
    assert format_score(text.replace(answer, "[4, 8, 20, 16]")) == 1


@pytest.mark.parametrize("reading", ["center", "area"])
def test_every_reward_has_its_anchors(reading):
    """A perfect box, a box that touches nothing and is far away, and silence."""
    said = ["<think>Here.</think><answer>[40, 40, 60, 60]</answer>",
            "<think>Here.</think><answer>[940, 940, 960, 960]</answer>", "no box"]
    columns = dict(box=[[40, 40, 60, 60]] * 3, width=[1000] * 3, height=[1000] * 3)
    form, overlap, place = (f(said, **columns) for f in make_rewards(Codec(), third=reading))
    assert form == [1, 1, 0] and overlap == [1, 0, 0]
    assert place == pytest.approx([1 if reading == "center" else 0.949, 0, 0], abs=1e-3)


def meant(u): return (np.exp(2.5 * u) - 1) / (np.exp(2.5) - 1)
def written(u): return np.exp(2.5 * u - 1) / (np.exp(2.5) - 1)
def standardised(rewards): return (rewards - rewards.mean()) / rewards.std(ddof=1)


@given(st.lists(st.floats(0, 1), min_size=3, max_size=16).filter(lambda v: max(v) - min(v) > 0.1))
def test_the_misplaced_bracket_is_invisible_in_the_advantages_of_one_reward(ious):
    assert standardised(written(np.array(ious))) == pytest.approx(standardised(meant(np.array(ious))),
                                                                  abs=1e-6)


def test_the_misplaced_bracket_shows_in_the_anchors_and_beside_the_format_reward():
    assert ([written(0), written(1)] == pytest.approx([0.03, 0.40], abs=5e-3)
            and [meant(0), meant(1)] == pytest.approx([0, 1]))
    u, form = np.array([0.3, 0.6, 0.9, 0]), np.array([1, 1, 0, 0])
    assert standardised(form + meant(u))[2] > -0.1 and standardised(form + written(u))[2] < -0.5
    assert standardised(form + math.e * written(u)) == pytest.approx(standardised(form + meant(u)))


# what a trainer hands over

RIGHT = "<think>Here.</think><answer>[40, 40, 60, 60]</answer>"
ROW = dict(box=[[40, 40, 60, 60]], width=[1000], height=[1000])


@pytest.mark.parametrize("completion, text", [
    (None, ""), ("", ""), ("a", "a"), ([], ""), ([{"role": "assistant"}], ""),
    ([{"role": "assistant", "content": None, "tool_calls": [{}]}], ""),
    ([{"role": "assistant", "content": ""}], ""), ([{"role": "assistant", "content": []}], ""),
    ([{"role": "assistant", "content": "first"}, {"role": "user", "content": "no"},
      {"role": "assistant", "content": "last"}], "last"),
    ([{"role": "assistant", "content": [{"type": "text", "text": "a"}, {"type": "image", "image": object()}, {
        "type": "image_url", "image_url": {"url": "x"}}, {"text": "b"}, "c", None, 3]}], "abc"),
    ([{"role": "assistant", "content": {"type": "text", "text": "a"}}], "a"),
    ([{"role": "assistant", "content": [{"type": "text", "text": None}, {"type": "text"}]}], ""),
    ({"role": "assistant", "content": "a"}, "a"),
    ([{"role": "assistant", "content": [{"type": "thinking", "text": "no"}, {"type": "text", "text": "a"}]}],
     "a")])
def test_the_text_of_a_completion(completion, text):
    assert text_of(completion) == text
    assert [f([completion], **ROW) for f in make_rewards(Codec())] == [[0.0]] * 3


@pytest.mark.parametrize("wrap", [lambda t: t, lambda t: [{"role": "assistant", "content": t}], lambda t: [
    {"role": "assistant", "content": "[0, 0, 1, 1]"},
    {"role": "assistant", "content": [{"type": "text", "text": t[:9]}, {"type": "text", "text": t[9:]}]}]])
def test_a_right_answer_earns_the_same_in_every_wrapping(wrap):
    assert [f([wrap(RIGHT)], **ROW) for f in make_rewards(Codec())] == [[1.0]] * 3


def test_a_row_without_a_box_earns_none():
    columns = dict(box=[None, [40, 40, 60, 60], []], width=[None, 1000, 1000], height=[None, 1000, 1000])
    for f in make_rewards(Codec()):
        assert f([RIGHT] * 3, **columns) == watched(f)([RIGHT] * 3, **columns) == [None, 1.0, None]
    for f in make_rewards(Codec()):
        assert f([RIGHT] * 2, box=[None] * 2, width=[None] * 2, height=[None] * 2) == [None, None]
    assert format_reward([RIGHT, "no"]) == [1.0, 0.0]  # the form needs no columns


@pytest.mark.parametrize("columns, missing", [({}, "box, width, height"),
                                              (dict(bbox=[[40, 40, 60, 60]], width=[9], height=[9]), "box"),
                                              (dict(box=[[40, 40, 60, 60]]), "width, height")])
def test_missing_columns_are_named(columns, missing):
    for f in make_rewards(Codec())[1:]:
        says = (rf"^{f.__name__} needs the columns box \(\[x1, y1, x2, y2\]\), width and height, "
                rf"in pixels of the original image: the rows have no {missing}$")
        with pytest.raises(ValueError, match=says):
            f([RIGHT], **columns)


@pytest.mark.parametrize("columns",
                         [dict(box=[[40, 40, 60]]), dict(box=[[[40, 40, 60, 60], [1, 1, 2, 2]]]),
                          dict(box=["40, 40, 60, 60"]), dict(box=[[40, 40, 60, "x"]]), dict(width=[None]),
                          dict(height=[0]), dict(width=["wide"]), dict(box=[[40, None, 60, 60]]),
                          dict(box=[[60, 40, 40, 60]]), dict(box=[[40, 40, 60, 40]]),
                          dict(box=[[math.nan, 40, 60, 60]]), dict(box=[[40, 40, math.inf, 60]])])
def test_a_row_that_is_no_box_is_named(columns):
    with pytest.raises(ValueError, match="row 1 of the batch has box"):
        iou_reward([RIGHT] * 2, **{n: values + columns.get(n, values) for n, values in ROW.items()})
    with pytest.raises(ValueError, match="one value for each of the 2 completions"):
        iou_reward([RIGHT] * 2, **ROW)


@pytest.mark.parametrize("name", ["format_reward", "iou_reward", "positional_reward"])
def test_rewards_have_an_import_path_and_can_be_pickled(name):
    found = getattr(importlib.import_module("rsground_nb.rewards"), name)
    for f in (found, pickle.loads(pickle.dumps(found))):
        assert f.__name__ == name and f([RIGHT], **ROW) == [1.0]


def test_made_rewards_can_be_pickled_and_run_in_another_process(tmp_path):
    made = make_rewards(Codec("qwen3_vl"), 2.0, "giou")
    (tmp_path / "rewards").write_bytes(pickle.dumps(made))
    program = (f"import pickle; print([f([{RIGHT!r}], box=[[40, 40, 70, 60]], width=[2000], height=[500]) "
               f"for f in pickle.load(open({str(tmp_path / 'rewards')!r}, 'rb'))])")
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.stdout.strip() == str([f([RIGHT], box=[[40, 40, 70, 60]], width=[2000], height=[500])
                                       for f in made]), done.stderr


def test_a_column_names_the_codec_of_each_row():
    columns = dict(box=[[80.0, 20, 120, 30]] * 2, width=[2000] * 2, height=[500] * 2,
                   codec=["qwen3_vl", "pixel"])
    assert (iou_reward([RIGHT] * 2, **columns)[0] == pytest.approx(1)
            and iou_reward([RIGHT] * 2, **columns)[1] == 0)
    assert BoxReward("iou", Codec("qwen3_vl"))([RIGHT], **{n: v[:1] for n, v in columns.items()
                                                           if n != "codec"}) == [pytest.approx(1)]
    with pytest.raises(ValueError, match="unknown codec 'yolo'"):
        iou_reward([RIGHT], **{**ROW, "codec": ["yolo"]})


def test_a_group_without_an_iou_has_weight_1():
    """One question's rows have no box: its IoU is None for all rollouts."""
    from test_trainer import ROWS as QUESTIONS, G, told

    trainer = told(rows=[{**QUESTIONS[0], "box": None}, *QUESTIONS[1:3]], max_steps=1, shuffle_dataset=False)
    trainer.train()
    weights = trainer._rollout_weights.view(-1, G)
    assert weights[0].tolist() == [1.0] * G and (weights[1:] > 1).all()


def test_the_example_of_the_docs_trains_with_trls_own_trainer(tmp_path, monkeypatch):
    [example] = [block for block in re.findall(r"```python\n(.*?)```",
                                               (ROOT / "docs" / "use.md").read_text(encoding="utf-8"), re.S)
                 if "GRPOTrainer" in block]
    monkeypatch.chdir(tmp_path)
    page = {}
    exec(example, page)
    log = page["trainer"].state.log_history
    assert (type(page["trainer"]).__module__.startswith("trl.")
            and {f"rewards/{n}_reward/mean" for n in ("format", "iou", "positional")} <= set(log[0]))


@pytest.mark.parametrize("widths", [-40, -12, -10, -3, 0, 3, 9, 10, 11, 20, 45])
def test_the_area_reading_keeps_its_digits_far_away(widths):
    """Against the integral of the kernel, whose terms are all positive: nothing cancels."""
    lo, scale = 20.0 * widths, 1 / (2 * 25 ** 2)
    at = lo + (POINTS + 1) / 2 * 20 - 10
    mean = (WEIGHTS * np.exp(-at ** 2 * scale)).sum() / 2
    middle = (WEIGHTS * np.exp(-((POINTS + 1) / 2 * 20 - 10) ** 2 * scale)).sum() / 2
    assert (one((lo, 0, lo + 20, 20), (0, 0, 20, 20), reading="area")
            == pytest.approx(mean * middle, rel=1e-8) and mean > 0)


@pytest.mark.parametrize("name", box_rewards())
def test_no_finite_number_makes_a_reward_leave_its_range_or_spoils_a_slope(name):
    for size in (1e-300, 1e-99, 1e9, 1e99, 1e150, 1e308):
        both = [(0, 0, size, size), (-size, -size, size, size), (size / 2, 0, size, 20), (0, 0, 20, 20)]
        said = torch.tensor([b for b in both for _ in both], dtype=torch.float64, requires_grad=True)
        value = box_rewards()[name](said, torch.tensor(both * 4, dtype=torch.float64), 100.0)
        assert ((value >= -1) & (value <= 1 + 1e-12)).all(), size
        if value.requires_grad: assert torch.isfinite(torch.autograd.grad(value.sum(), said)[0]).all(), size
