"""Filters of chains of thought: form, coordinates, claims, leaks; measured on texts written by people who did not know the filters. The planted defects are measured in the notebook, which CI executes."""
import json
from pathlib import Path

import pytest
from conftest import lines_run
from hypothesis import example, given, settings, strategies as st

from rsground_nb.boxes import Codec
from rsground_nb.filters import CODES, Fault, find_faults, take_apart, verdict
from rsground_nb.rewards import format_score

GRID, PIXELS = Codec("qwen3_vl"), Codec("qwen2_5_vl", max_pixels=112 * 112)
OBJECTS = [dict(category="vehicle", colour="white", box=[100, 100, 140, 120]), dict(category="vehicle", colour="red", box=[600, 110, 640, 140]),
           dict(category="bus", colour="blue", box=[400, 400, 500, 430]), dict(category="ship", colour="black", box=[100, 500, 160, 540])]
ROW = dict(expression="the white minibus left of the bus", box=(100, 100, 140, 120), width=800, height=600, category="vehicle", objects=None)
KNOWN = dict(ROW, objects=OBJECTS)
END = "</think><answer>[125, 167, 175, 200]</answer>"


def codes(thought, row=ROW): return [f.code for f in find_faults(f"<think>{thought}{END}", row, GRID)]


def test_precedence_is_the_order_of_the_codes():
    faults = find_faults("<think>I was told that the ship is at the bottom.</think><answer>[900, 900, 1200, 950]</answer>", ROW, GRID)
    assert [f.code for f in faults] == sorted([f.code for f in faults], key=list(CODES).index)
    assert verdict(faults) == "missing_step" and {"outside", "wrong_box", "leak"} <= {f.code for f in faults}
    assert verdict([]) == "ok" and Fault("leak", "x").what == "x"


# whose claim is it?

@pytest.mark.parametrize("row", [ROW, KNOWN], ids=["objects unknown", "objects known"])
@pytest.mark.parametrize("thought", """The bus is at the bottom; the minibus lies left of it. The minibus is at (150, 183).
The minibus stands at the left side of the image, at (150, 183). The bus is at (562, 692).
Neither the right side nor the bottom has a minibus. It is at (150, 183), top left.
Starting from the right edge and moving left, I reach the minibus in the upper left, (150, 183).
The minibus is in the top left. Its left edge is at x=125 and its right edge at x=175, top 167, bottom 200. So the centre is (150, 183).
The minibus is in the top left. The left edge is at x = 125, the right edge is at x = 175, the top edge at y = 167 and the bottom edge at y = 200.
The minibus is in the top left, with the top-left corner near (125, 167) and the bottom-right corner near (175, 200).
The minibus, top left, is lighter at its bottom; the right part is in shadow. Centre (150, 183).
The bus is further to the right and closer to the bottom. The minibus is in the top left at (150, 183).
I first check the bottom right; no minibus there. In the top left I find it: (150, 183).
The minibus at (150, 183) is in the top left and the bus, at (562, 692), is in the lower right, so the relation left of holds.
The bus, a long blue shape in the lower right, is to the right of the minibus, which is in the top left at (150, 183).
Right of the minibus is the bus. The minibus is at (150, 183), top left.
Given the size of the minibus, the box I answer with is small; it stands top left, at (150, 183), and the label on its roof cannot be read.""".split("\n"))
def test_honest_prose_is_kept(thought, row): assert codes(thought, row) == []


@pytest.mark.parametrize("row", [ROW, KNOWN], ids=["objects unknown", "objects known"])
@pytest.mark.parametrize("thought", """The minibus is at the bottom, around (150, 183).
At (150, 183), in the bottom right, stands the minibus.
The bus is at the bottom, and the minibus is at the right edge of the image, (150, 183).
The lower right corner holds the minibus, centred at (150, 183).
I look at the bottom right. The minibus is at (150, 183).
Looking toward the bottom right corner of the image, I see the white minibus at (150, 183).""".split("\n"))
def test_a_false_position_of_the_target_is_a_contradiction(thought, row): assert codes(thought, row) == ["contradiction"]


@pytest.mark.parametrize("thought", """The minibus at (150, 183) is right of the bus. It is at the top left.
The bus is left of the minibus. The minibus is at (150, 183), top left.
Left of the bus I see the ship. The ship is above the minibus, which is in the top left at (150, 183).
The bus, at (100, 100), is near. The minibus is in the top left, (150, 183).
There are three vehicles in the image. The minibus is in the top left, (150, 183).
The bus is in the top right. The minibus is in the top left, (150, 183).
The image shows only one vehicle, the minibus at (150, 183), top left.
The minibus is the rightmost vehicle, in the top left at (150, 183).
There is no bus. The minibus is in the top left at (150, 183).""".split("\n"))
def test_other_claims_need_a_list_of_objects(thought): assert codes(thought, KNOWN) == ["contradiction"] and codes(thought, ROW) == []


def test_what_the_expression_says_is_not_held_against_the_chain():
    loose = dict(ROW, expression="the minibus at the bottom")
    assert codes("The minibus at the bottom is the target: top left, near (150, 183).", loose) == []
    assert codes("The minibus is on the right, near (150, 183).", loose) == ["contradiction"]


# strange texts

BOX = "<answer>[125, 167, 175, 200]</answer>"

@pytest.mark.parametrize("text, code", [
    ("", "no_thought"), ("<think></think><answer></answer>", "no_thought"), (f"<think> \n </think>{BOX}", "no_thought"), (f"<think><think>the minibus, top left (150, 183)</think></think>{BOX}", "no_thought"),
    (f"<THINK>the minibus, top left (150, 183)</THINK>{BOX}", "no_thought"), (f"<think>the minibus, top left (150, 183)</think>{BOX}{BOX}", "no_box"), (f"<think>the minibus, top left (150, 183)</think>{BOX} Done.", "no_box"),
    ("<think>the minibus, top left (150, 183)", "no_box"), ("<think>the minibus, top left (150, 183)</think><answer>[nan, 1, 2, 3]</answer>", "no_box"), ("<think>the minibus, top left (150, 183)</think><answer>[1, 2, inf, 3]</answer>", "no_box"),
    ("<think>the minibus, top left (150, 183)</think><answer>[١٢٥, ١٦٧, ١٧٥, ٢٠٠]</answer>", "no_box"), ("<think>the minibus, top left (150, 183)</think><answer>[125.4, 166.9, 175.0, 200.2]</answer>", "ok"),
    ("<think>the minibus, top left (150, 183)</think><answer>[175, 200, 125, 167]</answer>", "outside"), ("<think>the minibus, top left (150, 183)</think><answer>[-125, 167, 175, 200]</answer>", "outside")])
def test_strange_texts(text, code): assert verdict(find_faults(text, ROW, GRID)) == code


pieces = st.lists(st.sampled_from(["<think>", "</think>", "<answer>", "</answer>", "[1, 2, 3, 4]", "(150, 183)", "the minibus ", "it ", "left of ", "the bus ", "at the top left ", "is ", ". ", "which ", "its ", "two ", "İ", "x = 5 ", "NaN", "the leftmost ", "no other bus is larger "]), max_size=40).map("".join)

@settings(max_examples=400, deadline=None)
@given(st.one_of(st.text(max_size=300), pieces, pieces.map(lambda t: f"<think>{t}{END}")), st.sampled_from([ROW, KNOWN, dict(KNOWN, category=None), dict(ROW, expression="", category=None)]), st.sampled_from([GRID, PIXELS]))
@example("<think>it" + END, dict(KNOWN, objects=[]), GRID)
def test_no_text_raises_and_what_is_kept_is_paid(text, row, codec):
    faults = find_faults(text, row, codec)
    assert {f.code for f in faults} <= set(CODES)
    if not {"no_thought", "no_box", "outside"} & {f.code for f in faults}: assert format_score(text) == 1.0


@given(st.text(max_size=100) | pieces)
def test_without_faults_of_form_the_format_reward_pays(text):
    _, box, faults = take_apart(text)
    if not faults and box[0] < box[2] and box[1] < box[3]: assert format_score(text) == 1.0
    if format_score(text): assert not faults


@pytest.mark.parametrize("unit", ["the minibus at (1, 2) left of it ", "upper left of ", "x y ", "given the box ", "the ", "( ", "1", " ", "it is left of it, which is two "])
def test_the_work_grows_with_the_length_not_its_square(unit):
    """Lines executed; what a pattern does inside is not counted, but it must come to its end."""
    def lines(length): return lines_run(lambda: find_faults(f"<think>{unit * (length // len(unit))}{END}", KNOWN, GRID))
    assert lines(40_000) < 6 * max(lines(10_000), 1000)  # 4 if linear, 16 if quadratic


# measured

def scores(truth, found):
    "{verdict: (recall, precision)}"
    return {name: tuple(sum(t == f == name for t, f in zip(truth, found)) / max(1, n) for n in (sum(t == name for t in truth), sum(f == name for f in found))) for name in ["ok", *CODES]}


BLIND = [json.loads(line) for line in (Path(__file__).parent / "blind_chains.jsonl").read_text(encoding="utf-8").splitlines()]

MEASURED = {"dev": {}, "test": {"ok": (0.985, 0.884), "missing_step": (1.0, 0.894), "wrong_frame": (0.95, 1.0), "wrong_box": (0.941, 1.0), "leak": (0.857, 1.0), "contradiction": (0.666, 0.923)}}  # 1 and 1 where nothing is said

@pytest.mark.parametrize("half", ["dev", "test"])
def test_chains_of_another_author(half):
    """Written without knowledge of the filters. Failures of the half `dev` were read and mended; of the half `test` only these numbers were looked at, four times by the first author of the filters and once by the second. The bars are what was measured."""
    lines = [x for x in BLIND if x["half"] == half]
    found = [verdict(find_faults(x["text"], x, Codec(x["codec"], max_pixels=x["max_pixels"]))) for x in lines]
    measured = scores([x["defect"] for x in lines], found)
    for name, now in measured.items(): assert all(m >= bar - 1e-3 for m, bar in zip(now, MEASURED[half].get(name, (1, 1)))), (name, now)


def test_sentences_written_before_the_patterns_were_read():
    """120 leaks, 80 honest look-alikes, 60 contradictions and 60 true claims, each in a chain that is right otherwise. Their failures were read and mended: this holds what was won, and says nothing of new texts."""
    sentences = json.loads((Path(__file__).parent / "claims.json").read_text(encoding="utf-8"))
    truth, found = zip(*((x["defect"], verdict(find_faults(x["text"], sentences["scenes"][x["scene"]], Codec()))) for x in sentences["rows"]))
    measured = scores(truth, found)
    for name, bars in {"leak": (1, 1), "contradiction": (0.933, 0.982), "ok": (0.992, 0.972)}.items(): assert all(m >= bar - 1e-3 for m, bar in zip(measured[name], bars)), (name, measured[name])
