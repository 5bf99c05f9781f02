import json
import math
import subprocess
import sys

import pytest
from hypothesis import example, given, settings, strategies as st
from shapely import affinity, geometry
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import smart_resize as reference

from benchmark_parsing import completions
from conftest import ROOT
from rsground_nb.boxes import (BOX, GRID, NOTATION, Codec, centre_distance, completion_box, diou, giou, iou,
                               parse_box, parse_completion, smart_resize)
from rsground_nb.parsing import LARGEST
from rsground_nb.shapes import turned_box

FAMILIES = ["pixel", "qwen2_5_vl", *GRID]
side = st.integers(1, 4000)
coordinate = st.floats(-50, 1000, allow_nan=False)
anything = st.tuples(*[coordinate] * 4)
at, extent = st.floats(0, 1000), st.floats(1, 300)
boxes = st.tuples(at, at, extent, extent).map(lambda b: (b[0], b[1], b[0] + b[2], b[1] + b[3]))


@settings(max_examples=3000)
@given(side, side, st.sampled_from([(28, 3136, 12544), (28, 3136, 1003520), (32, 4096, 50176)]))
def test_smart_resize_is_the_processors_own(height, width, limits):
    if max(height, width) > 200 * min(height, width):
        with pytest.raises(ValueError): smart_resize(height, width, *limits)
    else: assert smart_resize(height, width, *limits) == reference(height, width, *limits)


# codecs

def test_every_family_has_a_notation(): assert set(NOTATION) == set(FAMILIES)


def test_the_written_numbers_by_hand():
    box = (240, 264, 332, 361)
    written = {"pixel": "[240, 264, 332, 361]", "qwen2_5_vl": '{"bbox_2d": [244, 268, 337, 366]}',
               "qwen3_vl": '{"bbox_2d": [300, 330, 415, 451]}',
               "qwen2_vl": "<|box_start|>(300,330),(415,451)<|box_end|>",
               "internvl": "<box>[[300, 330, 415, 451]]</box>",
               "deepseek_vl2": "<|det|>[[300, 330, 415, 451]]<|/det|>",
               "geochat": "{<30><33><42><45>}", "vrsbench": "{<30><33><42><45>}"}
    assert {name: Codec(name).write(box, 800, 800) for name in FAMILIES} == written
    assert Codec("deepseek_vl2").decode((0, 999, 999, 999), 800, 600) == (0, 600, 800, 600)


@given(st.sampled_from(FAMILIES), st.integers(30, 3000), st.integers(30, 3000), st.data())
def test_a_round_trip_is_off_by_half_a_unit_at_most(name, width, height, data):
    codec = Codec(name)
    box = [data.draw(st.floats(0, limit)) for limit in (width, height, width, height)]
    fw, fh = codec.frame(width, height)
    back = codec.decode(codec.encode(box, width, height), width, height)
    for before, after, unit in zip(box, back, [width / fw, height / fh] * 2):
        assert abs(before - after) <= unit / 2 + 1e-6


@given(st.sampled_from(FAMILIES), st.integers(100, 3000), st.integers(100, 3000), boxes)
@example("geochat", 800, 800, (5, 5, 17, 17))
def test_the_iou_of_a_round_trip_has_the_stated_floor(name, width, height, box):
    codec = Codec(name)
    fw, fh = codec.frame(width, height)
    kept = 1 - width / fw / (box[2] - box[0]), 1 - height / fh / (box[3] - box[1])
    back = codec.decode(codec.encode(box, width, height), width, height)
    assert iou(box, back) >= max(0, kept[0]) * max(0, kept[1]) - 1e-9


def test_a_perfect_answer_on_a_grid_of_100_can_miss_a_12_px_vehicle():
    back = Codec("geochat").decode(Codec("geochat").encode((5, 5, 17, 17), 800, 800), 800, 800)
    assert back == (8, 8, 16, 16) and iou(back, (5, 5, 17, 17)) == pytest.approx(64 / 144)


@given(st.sampled_from(FAMILIES), st.integers(200, 3000), st.integers(200, 3000), boxes,
       st.none() | st.integers(-180, 180))
def test_what_a_family_writes_is_read_back(name, width, height, box, angle):
    codec = Codec(name)
    written = codec.encode(box, width, height)
    if GRID.get(name) != 100: angle = None
    parsed = parse_box(codec.write(box, width, height, angle))
    if written[0] < written[2] and written[1] < written[3]:
        assert parsed.box == written and parsed.angle == angle and parsed.reason == "ok"
    else: assert parsed.box is None and "no area" in parsed.reason
    assert parse_completion(f"<answer>{codec.write(box, width, height, angle)}</answer>") == parsed


@pytest.mark.parametrize("name", [n for n in FAMILIES if n not in ("geochat", "vrsbench")])
def test_an_angle_is_refused_where_there_is_no_notation_for_it(name):
    with pytest.raises(ValueError, match="no notation for an angle"):
        Codec(name).write((1, 2, 3, 4), 100, 100, angle=45)


# agreement of two boxes

@given(anything, anything)
def test_agreement_is_symmetric_and_in_its_range_even_for_swapped_corners(a, b):
    assert 0 <= iou(a, b) <= 1 + 1e-9
    for measure in (iou, giou, diou, centre_distance): assert measure(a, b) == pytest.approx(measure(b, a))
    for measure in (giou, diou): assert -1 - 1e-9 <= measure(a, b) <= iou(a, b) + 1e-9


@given(boxes, boxes)
def test_iou_and_giou_are_those_of_shapely(a, b):
    first, second = geometry.box(*a), geometry.box(*b)
    union, around = (first.union(second).area, geometry.box(*geometry.MultiPolygon([first, second]).bounds)
                     .area if a != b else first.area)
    overlap = first.intersection(second).area / union
    assert iou(a, b) == pytest.approx(overlap, abs=1e-9)
    assert giou(a, b) == pytest.approx(overlap - (around - union) / around, abs=1e-9)
    assert centre_distance(a, b) == pytest.approx(first.centroid.distance(second.centroid), abs=1e-6)


@given(boxes)
def test_a_box_agrees_fully_with_itself(box):
    assert (iou(box, box) == pytest.approx(1) and giou(box, box) == pytest.approx(1)
            and diou(box, box) == pytest.approx(1) and centre_distance(box, box) == 0)


def test_boxes_without_area_agree_with_nothing():
    for box in [(5, 5, 5, 9), (9, 5, 5, 9), (0, 0, 0, 0), (0, 0, 1e-200, 1e-200)]:
        for other in [(0, 0, 10, 10), box]:
            assert (iou(box, other), giou(box, other), diou(box, other)) == (0, -1, -1)


@given(boxes, st.floats(-360, 360))
def test_the_box_around_a_turned_box_is_that_of_shapely_in_both_directions(box, angle):
    for direction in (1, -1):
        assert turned_box(box, angle) == pytest.approx(
            affinity.rotate(geometry.box(*box), direction * angle).bounds, abs=1e-6)


# parsing

GOOD = {"[4, 8, 20, 16]": (4, 8, 20, 16), "  [ 4 ,8,\n20 , 16 ]  ": (4, 8, 20, 16),
        "[4.5, 8., .5e2, +16]": (4.5, 8, 50, 16), "[-4, -8.25, 20, 16]": (-4, -8.25, 20, 16),
        "[[4, 8, 20, 16]]": (4, 8, 20, 16), "[[4, 8, 20, 16], [0, 0, 9, 9]]": (4, 8, 20, 16),
        '{"bbox_2d": [4, 8, 20, 16], "label": "ship"}': (4, 8, 20, 16), '```json\n[\n\t{"bbox_2d": [4, 8, '
        '20, 16], "label": "ship"},\n\t{"bbox_2d": [0, 0, 9, 9]}\n]\n```': (4, 8, 20, 16),
        "{<4><8><20><16>}": (4, 8, 20, 16), "<p>the ship</p> {<4><8><20><16>|<45>}": (4, 8, 20, 16),
        "<|object_ref_start|>ship<|object_ref_end|><|box_start|>(4,8),(20,16)<|box_end|>": (4, 8, 20, 16),
        "(4, 8), (20, 16)": (4, 8, 20, 16),
        "Of the 2 ships (north) the left one: [4, 8, 20, 16]. Its width is 16.": (4, 8, 20, 16),
        "［４，８，２０，１６］": (4, 8, 20, 16), "【４、８、２０、１６】": (4, 8, 20, 16),
        "［－４，−８．５，２０，１６］": (-4, -8.5, 20, 16),
        "｛＜４＞＜８＞＜２０＞＜１６＞｝": (4, 8, 20, 16),
        "[1, 2, 3, 4, 5] or [4, 8, 20, 16]": (4, 8, 20, 16),
        "[999999.9, 8, 999999.95, 16]": (999999.9, 8, 999999.95, 16),}
BAD = {"": "no [x1", "about here": "no [x1", "[4, 8, 20": "no [x1", "[4, 8, 20, 16": "cut off",
       "[]": "no [x1", "[[], []]": "no [x1", "[1, 2, 3, 4, 5]": "5 numbers in a row", "[1, 2, 3]": "no [x1",
       "[1, 2, 3, null]": "no [x1", "[1, 2, 3, 4²]": "no [x1", "[--1, 2, 3, 4]": "no [x1",
       "{<1><2><3>}": "no [x1", "{<1><2><3><4><5>}": "no [x1", "{<1><2><3><4>|<45>|<45>}": "no [x1",
       "(1,2)": "no [x1", "(1,2),(3,4),(5,6)": "no [x1", "(1,2),(3,4),(5,6),(7,8)": "no [x1",
       "[20, 8, 4, 16]": "corners", "[4, 16, 20, 8]": "corners", "[4, 8, 4, 16]": "no area",
       "[0, 0, 0, 0]": "no area", "{<20><8><4><16>}": "corners", "(20,8),(4,16)": "corners",
       "[20, 8, 4, 16], [4, 8, 20, 16]": "corners", "[NaN, 8, 20, 16]": "NaN",
       "[4, 8, nan, 16] [4, 8, 20, 16]": "NaN",
       "[1e400, 8, 20, 16]": "too large", "[4, 8, Infinity, 16]": "too large",
       "[-inf, 8, 20, 16]": "too large", "[4, 8, 1000000, 16]": "too large",
       "{<4><8><20><16>|<1e400>}": "too large", "{<4><8><20><16>|<nan>}": "NaN",
       "[4, 8, 20, " + "9" * 5000 + "]": "too large", "[-" + "９" * 5000 + ", 8, 20, 16]": "too large",}


@pytest.mark.parametrize("answer", GOOD, ids=range(len(GOOD)))
def test_these_answers_are_read(answer):
    assert parse_box(answer)[:2] == (GOOD[answer], "ok")
    assert parse_completion(f"<think>[1, 2, 3, 4]</think> so <answer>{answer}</answer> [0, 0, 1, 1]")[:3] == (
        GOOD[answer], "ok", "[1, 2, 3, 4]")


@pytest.mark.parametrize("answer", BAD, ids=range(len(BAD)))
def test_these_answers_are_refused_with_their_reason(answer):
    parsed = parse_completion(f"<answer>{answer}</answer>")
    assert parsed.box is None and BAD[answer] in parsed.reason and parsed == parse_box(answer)


def test_the_first_answer_counts_and_must_be_closed():
    assert parse_completion("<answer>here</answer><answer>[4, 8, 20, 16]</answer>").box is None
    assert parse_completion("<answer>[0, 0, 9, 9]</answer><answer>[4, 8, 20, 16]</answer>").box == (0, 0, 9,
                                                                                                    9)
    assert "there is no <answer>" in parse_completion("The ship is here.").reason
    assert "not closed" in parse_completion("<answer>[4, 8, 20, 16]").reason
    assert "not closed" in parse_completion("<answer>[4, 8, 20, 16]</answe").reason


def test_the_answer_is_looked_for_after_the_last_thought():
    assert parse_completion("<think>In <answer>[1, 2, 3, 4]</answer> tags?</think><answer>[4, "
                            "8, 20, 16]</answer>").box == (4, 8, 20, 16)
    assert parse_completion("<think>a</think><answer>[1, 2, 3, 4]</answer><think>No.</think><answer>[4, "
                            "8, 20, 16]</answer>").box == (4, 8, 20, 16)
    assert parse_completion("<think>I write </think> first, then</think>[4, 8, 20, 16]")[:3] == (
        (4, 8, 20, 16), "ok", "I write </think> first, then")
    assert parse_completion("The ship [1, 2, 3, 4] it is.</think>\n\n4, 8, 20, 16").box == (4, 8, 20, 16)
    for cut in ("<think>It may be [4, 8, 20, 16]", "<think>4, 8, 20, 16",
                "<think>a</think><think>[4, 8, 20, 16]"):
        assert "<think> is not closed" in parse_completion(cut).reason


ONE_BOX = [  # 10, 20, 30, 40 in notations without a name
    "10, 20, 30, 40", "(10, 20, 30, 40)", "[10 20 30 40]", "10 20 30 40", "10; 20; 30; 40",
    "{10, 20, 30, 40}", "10,20 30,40", "10\n20\n30\n40", "|10|20|30|40|", "-> 10, 20, 30, 40",
    "10.0, 20.00, 3e1, 40.", "<bbox>10,20,30,40</bbox>", "<box>(10,20),(30,40)</box>",
    "<|box_start|>10,20,30,40<|box_end|>", "<loc_10><loc_20><loc_30><loc_40>", "<10><20><30><40>",
    "<ANSWER>[10, 20, 30, 40]</ANSWER>", "<p>the ship</p> 10 20 30 40",
    "<x1>10</x1><y1>20</y1><x2>30</x2><y2>40</y2>", "[[10, 20], [30, 40]]",
    "[[10], [20], [30], [40]]", '["10", "20", "30", "40"]', "['10','20','30','40']",
    '{\\"bbox\\": [\\"10\\", \\"20\\", \\"30\\", \\"40\\"]}', '{"bbox_2d": [10, 20, 30, 40,]}',
    '{"x1": 10, "y1": 20, "x2": 30, "y2": 40}', '{"bbox": {"x1": 10, "y1": 20, "x2": 30, "y2": 40}}',
    '{"x1": "10", "x2": "30", "y1": "20", "y2": "40"}', "x1=10, y1=20, x2=30, y2=40",
    "x_min: 10, y_min: 20, x_max: 30, y_max: 40", "X1=10 Y1=20 X2=30 Y2=40",
    '{"ymin": 20, "xmin": 10, "ymax": 40, "xmax": 30}', '{"left": 10, "top": 20, "right": 30, "bottom": 40}',
    '{"x0": 10, "y0": 20, "x1": 30, "y1": 40}', '{"x": 10, "y": 20, "w": 20, "h": 20}',
    '{"x": 10, "y": 20, "width": 20, "height": 20}', "- x1: 10\n- y1: 20\n- x2: 30\n- y2: 40",
    '{"top_left": [10, 20], "bottom_right": [30, 40]}', "top-left (10, 20), bottom-right (30, 40)",
    "The top left corner is (10, 20) and the bottom right corner is (30, 40).", "from (10, 20) to (30, 40)",
    "[10, 20] -> [30, 40]", "(10,20)-(30,40)", '[{"x": 10, "y": 20}, {"x": 30, "y": 40}]',
    "```json\n{\"x1\": 10, \"y1\": 20, \"x2\": 30, \"y2\": 40}\n```", "\\boxed{10, 20, 30, 40}",
    "**10, 20, 30, 40**", "[10px, 20px, 30px, 40px]", "10 px, 20 px, 30 px, 40 px",
    "The 2 ships on the left: 10, 20, 30, 40.", "１０、２０、３０、４０", "（10，20），（30，40）",
    "array([10., 20., 30., 40.])", "[10, 20, 30, 40, 0.93]", "10 20 30 40 0.93",
    "10,20,30,40,1.0", "<box>10,20,30,40</box><box>10,20,30,40</box>",
    "[10, 20, 30, 40], that is [10, 20, 30, 40]", "[10 20 30 40] [10 20 30 40]",
    '{"bbox_2d": "10 20 30 40", "label": "a long label that stands behind the box"}', "10, 20, 30, 40]"]
NO_CLEAR_BOX = {
    "[10%, 20%, 30%, 40%]": "percent", "10 %, 20 %, 30 %, 40 %": "percent",
    "10, 20, 30, 40 or 50, 60, 70, 80": "several boxes",
    "<box>10 20 30 40</box><box>10 20 30 41</box>": "several boxes",
    "10 20 30 40\n50 60 70 80": "8 numbers in a row", "[1, 10, 20, 30, 40]": "5 numbers in a row",
    "[10, 20, 30, 40, 3]": "5 numbers in a row", "(10,20), (30,20), (30,40), (10,40)": "no [x1",
    "100,200 300,400 500,600 700,800": "8 numbers", "100,200, 300,400, 500,600, 700,800": "8 numbers",
    "x: 10, 30; y: 20, 40": "no [x1", "x 10-30, y 20-40": "no [x1", "10 - 30, 20 - 40": "no [x1",
    "10 to 30, 20 to 40": "no [x1", '{"cx": 10, "cy": 20, "w": 30, "h": 40}': "no [x1",
    '{"center": [10, 20], "width": 30, "height": 40}': "not the edges",
    '{"x": 10, "y": 20, "width": 30}': "no [x1", "{\"x1\": 10, \"y1\": 20, \"x2\": 30, \"y2\": 4": "cut off",
    "(10, 20, 30, 4": "cut off", "<bbox>10,20,30,4": "cut off", "[[10, 20], [30, 4": "cut off",
    "1.2.3.4": "no [x1", "<loc0010><loc0020><loc0030><loc0040>": "no [x1", "30, 40, 10, 20": "corners",
    "2026-11-28 10:20": "no [x1", "In 4 of 10 pictures there are 20 or 30 ships, 40 in one.": "no [x1"}


@pytest.mark.parametrize("text", ONE_BOX)
def test_one_clear_box_is_read_with_and_without_the_tag(text):
    for whole in (text, f"<answer>{text}</answer>", f"<think>Not [1, 2, 3, 4].</think>\n{text}"):
        assert parse_completion(whole)[:2] == ((10, 20, 30, 40), "ok"), whole


@pytest.mark.parametrize("text", NO_CLEAR_BOX)
def test_what_is_no_clear_box_is_refused_with_its_reason(text):
    alone, answer, said = (parse_completion(text), parse_completion(f"<answer>{text}</answer>"),
                           NO_CLEAR_BOX[text])
    assert (alone.box is answer.box is None and said in answer.reason
            and ("there is no <answer>" if said == "no [x1" else said) in alone.reason)


def test_of_two_marked_boxes_the_first_counts_in_an_answer_and_none_elsewhere():
    two = "[10, 20, 30, 40] or [50, 60, 70, 80]"
    assert (parse_completion(f"<answer>{two}</answer>").box == (10, 20, 30, 40)
            and "several boxes" in parse_completion(two).reason)


@pytest.mark.parametrize("text, box", [
    ("[1,024.0, 20.0, 1,100.5, 40.0]", (1024, 20, 1100.5, 40)),
    ("[1,024.5, 1,100.25, 2,048.75, 3,000.5]", (1024.5, 1100.25, 2048.75, 3000.5)),
    ("10, 20, 30, 1,024", (10, 20, 30, 1024)), ("-10, -20.5, 30, 40", (-10, -20.5, 30, 40)),
    ("x1=-10, y1=-20, x2=30, y2=40", (-10, -20, 30, 40)), ("(-10, -20), (-5, 4)", (-10, -20, -5, 4))])
def test_thousands_and_signs_are_read(text, box):
    assert parse_completion(text).box == parse_box(text).box == box


@settings(deadline=None)
@given(st.tuples(*[st.floats(-999, 999).map(lambda v: round(v, 2))] * 4),
       st.sampled_from(["{}, {}, {}, {}", "<b>{} {} {} {}</b>", "[[{}, {}], [{}, {}]]",
                        '{{"x1": {}, "y1": {}, "x2": {}, "y2": {}}}', "({}, {}) to ({}, {})"]))
def test_any_numbers_survive_any_notation(box, form):
    text = form.format(*box)
    assert parse_box(text).box == (box if box[0] < box[2] and box[1] < box[3] else None)


@pytest.mark.parametrize("what", [None, b"<answer>[4, 8, 20, 16]</answer>", 7, float("nan"),
                                  ["<answer>[4, 8, 20, 16]</answer>"], {"content": ""}], ids=repr)
def test_what_is_not_text_has_a_reason(what):
    assert parse_completion(what)[:2] == parse_box(what)[:2] == (None, "not text")
    assert completion_box(what, Codec(), 800, 800) is None


@given(st.text() | st.text(alphabet="<>/answerthink[]0123456789,. -") | st.lists(st.sampled_from(
    [*"[](){}<>|,.-+e１２［］，", "12", "<answer>", "</answer>", "nan", "1e999"])).map("".join))
def test_parsing_gives_a_box_or_a_reason_and_never_fails(text):
    for parsed in (parse_completion(text), parse_completion(f"<answer>{text}</answer>"), parse_box(text)):
        assert (parsed.box is not None) == (parsed.reason == "ok")


def test_every_decimal_digit_of_unicode_is_read_and_no_look_alike_breaks_the_reader():
    for digit in filter(str.isdecimal, map(chr, range(sys.maxunicode + 1))):
        assert parse_box(f"[{digit}, 8, 20, 16]").box == (int(digit), 8, 20, 16)
    for word in ("\u0131nf", "\u0130nf", "INF", "NAN", "nAn", "Infinıty", "1_000", "1\u066b5", "²", "½", "Ⅳ",
                 "一"):
        assert parse_box(f"[4, 8, {word}, 16]").box is None


@given(st.lists(st.floats(allow_nan=True, allow_infinity=True), min_size=4, max_size=4))
def test_json_numbers_are_read_as_json_reads_them(numbers):
    parsed = parse_box(json.dumps({"bbox_2d": numbers}))
    fine = all(abs(v) < LARGEST for v in numbers) and numbers[0] < numbers[2] and numbers[1] < numbers[3]
    assert parsed.box == (tuple(numbers) if fine else None)


@given(boxes.map(lambda b: tuple(round(v, 3) for v in b)))
def test_the_strict_form_is_read_as_it_stands(box):
    text = str(list(box))
    assert tuple(float(v) for v in BOX.fullmatch(text).groups()) == parse_box(text).box == box


def test_a_hundred_thousand_random_and_mutated_completions():
    found = 0
    for text in completions(100_000, seed=0):
        box, reason, thinking, angle = parse_completion(text)
        assert (box is None) != (reason == "ok") and isinstance(thinking, str)
        if box is None: continue
        found += 1
        assert (len(box) == 4 and all(math.isfinite(v) and abs(v) < LARGEST for v in box) and box[0] < box[2]
                and box[1] < box[3])
        assert angle is None or math.isfinite(angle)
    assert 20_000 < found < 80_000


def test_parsing_takes_linear_time_on_hostile_text():
    """No clock is read: a parser whose time grows with the square of these lengths does
    not come back from this test."""
    parse_completion("<answer>" * 100_000)
    parse_completion("<think>" * 100_000)
    for piece in ("1 ", "1, ", "x1: 1, ", "1 and ", "1 to ", "(1) to ", "to ", "the top ", "1 2 3 4 x ",
                  "<loc_1>", "1,024, ", "10% ", '"1", ', "<b>1 2 3 4</b>", "9"):
        for text in (piece * 30_000, f"1, 2, {' ' * 30_000}{piece}", f"1{piece * 10_000}{' ' * 10_000}to ("):
            parse_completion(text)
    for piece in ("[1, ", "[", "(1,2)", "(1,2), ", "(1, 2", "{<1>", "{", "<", "1.", "1e", "[1,2,3]",
                  "\u0301\u0316", "\ufdfa", " ", "９"):
        for start in ("", "[", "[1", "(1,", "{<"):
            parse_completion(f"<answer>{start}{piece * 50_000}</answer>")


def test_the_benchmark_writes_a_row_for_each_run(tmp_path):
    out = tmp_path / "results" / "parsing.csv"
    command = [sys.executable, ROOT / "tests" / "benchmark_parsing.py", "--count", "500", "--seed", "3",
               "--out", out]
    for _ in range(2):
        said = subprocess.run(command, capture_output=True, text=True, check=True, cwd=ROOT).stdout
    assert "500 completions" in said and "a second" in said
    head, *rows = out.read_text(encoding="utf-8").splitlines()
    assert (head == "what,count,seconds,per_second,command,seed" and len(rows) == 2
            and rows[0].startswith("parse_completion,500,"))
