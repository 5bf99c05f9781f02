"""Filters of chains of thought: the fields of a Thought with one planted defect each, the plain filters of
free text on texts of other authors."""
import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from conftest import lines_run
from hypothesis import example, given, settings, strategies as st
from PIL import Image
from planting import PLANTED, judged, planted, scores

from rsground_nb import filters, scenes
from rsground_nb.boxes import Codec
from rsground_nb.cot import Candidate, Cue, Step, Target, make_thought, render, rule_drafts
from rsground_nb.data import to_dataset
from rsground_nb.filters import CODES, Fault, find_faults, take_apart, verdict
from rsground_nb.rewards import format_score
from rsground_nb.scenes import scene_records

GRID, PIXELS = Codec("qwen3_vl"), Codec("qwen2_5_vl", max_pixels=112 * 112)
OBJECTS = [dict(category="vehicle", colour="white", box=[100.0, 100, 140, 120]),
           dict(category="vehicle", colour="red", box=[600.0, 110, 640, 140]),
           dict(category="bus", colour="blue", box=[400.0, 400, 500, 430]),
           dict(category="ship", colour="black", box=[100.0, 500, 160, 540])]
ROW = dict(expression="the white minibus left of the bus", box=[100.0, 100, 140, 120], width=800, height=600,
           category="vehicle", objects=None)
KNOWN = dict(ROW, objects=OBJECTS)
END = "</think><answer>[125, 167, 175, 200]</answer>"


def codes(thought, row=ROW): return [f.code for f in find_faults(f"<think>{thought}{END}", row, GRID)]


# planted defects

@pytest.fixture(scope="module")
def rows():
    """260 scenes of three styles, a third of each number of hops; nothing is drawn.
    `benchmark_chains.py` takes 2,000."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(scenes, "draw_scene", lambda scene, rng: Image.new("RGB", (2, 2)))
        return [{k: v for k, v in r.items() if k != "image"}
                for style, count in (("simple", 200), ("aerial", 15), ("other", 45))
                for r in scene_records(count, 7, 112, style=style, hops=(1, 2, 3))]


@pytest.mark.parametrize("codec", [GRID, PIXELS], ids=lambda c: c.name)
def test_every_thought_of_the_rule_teacher_is_kept(rows, codec):
    drafts = rule_drafts(to_dataset(rows), codec)
    bad = [(r["expression"], d.completion, f) for r, d in zip(rows, drafts)
           for f in [find_faults(d.completion, r, codec, thought=d.thought)] if f or d.trouble]
    assert not bad, bad[:2]


@pytest.fixture(scope="module")
def chains(rows): return list(planted(rows, GRID, np.random.default_rng(0)))


def measured(chains):
    found = [verdict(find_faults(text, row, GRID, thought=thought)) for _, row, text, thought in chains]
    return scores([c[0] for c in chains], found)


def test_planted_defects_are_found_and_called_by_their_name(chains):
    table = measured(chains)
    assert set(table) == {"ok", *CODES} == set(PLANTED) and min(n for n, *_ in table.values()) >= 15
    assert {name: v for name, v in table.items() if min(v[2:]) < 0.99} == {}


@pytest.mark.parametrize("code, check",
                         [("wrong_candidate", "candidate_faults"), ("missing_candidate", "missing_faults"),
                          ("wrong_anchor", "anchor_faults"), ("wrong_outcome", "outcome_faults"),
                          ("wrong_decision", "decision_faults"), ("misread", "misread_faults"),
                          ("leak", "leak_faults"), ("wrong_box", "box_faults"), ("wrong_frame", "box_faults"),
                          ("outside", "box_faults")])
def test_without_its_check_a_defect_is_not_found(chains, monkeypatch, code, check):
    """The same planted set with one check removed: its class is lost, so the check is what finds it."""
    mine = [c for c in chains if c[0] == code]
    monkeypatch.setattr(filters, "CHECKS", tuple(c for c in filters.CHECKS if c.__name__ != check))
    monkeypatch.setattr(filters, check, lambda *args: [])
    if code == "misread": monkeypatch.setattr(filters, "unsaid", lambda *args, **more: [])
    assert measured(mine)[code][2] == 0


@pytest.mark.parametrize("code", ["no_thought", "no_box"])
def test_without_the_check_of_form_its_defects_are_not_found(chains, monkeypatch, code):
    whole = filters.take_apart
    monkeypatch.setattr(filters, "take_apart", lambda text: (*whole(text)[:2], []))
    assert measured([c for c in chains if c[0] == code])[code][2] == 0


@pytest.mark.parametrize("seed", range(3))
def test_other_seeds_and_a_student_of_pixels_give_the_same(seed, monkeypatch):
    monkeypatch.setattr(scenes, "draw_scene", lambda scene, rng: Image.new("RGB", (2, 2)))
    truth, found, wrong = judged(list(scene_records(39, 20 + seed, style=("simple", "aerial", "other")[seed],
                                                    hops=(1, 2, 3))), PIXELS, np.random.default_rng(seed))
    assert wrong == []


def test_faults_come_in_the_order_in_which_a_thought_is_told():
    row = dict(KNOWN, expression="the white vehicle left of the bus")
    thought = make_thought(row, GRID)
    assert ([len(step.candidates) for step in thought.steps] == [1, 1]
            and find_faults(render(thought, GRID, 800, 600), row, GRID, thought=thought) == [])
    thought.target.attributes.append("striped")
    thought.steps[0].candidates[0].colour = "red"
    thought.steps[1].left = []
    faults = find_faults("<think>As the given box shows. </think><answer>[900, 900, 1200, 950]</answer>", row,
                         GRID, thought=thought)
    assert [f.code for f in faults] == ["outside", "wrong_box", "leak", "misread", "wrong_candidate",
                                        "wrong_outcome", "wrong_decision"]
    assert ("steps[0].candidates[0]: it is blue" in faults[4].what and verdict(faults) == "outside"
            and verdict([]) == "ok" and Fault("leak", "x").what == "x")


# sibling defects that are not planted

def thought_of(row): return make_thought(row, GRID)


def verdict_of(thought, row):
    return verdict(find_faults(render(thought, GRID, row["width"], row["height"]), row, GRID,
                               thought=thought))


SHIPS = [dict(category="ship", colour=c, box=[float(x), 100.0, x + 60.0, 130.0])
         for c, x in (("red", 100), ("blue", 350), ("red", 650))]
PLAIN = dict(expression="the leftmost ship", box=SHIPS[0]["box"], width=800, height=600, category="ship",
             objects=SHIPS, expression_id="a")


def change(row=PLAIN, **fields):
    """The rule teacher's Thought with fields of its last step replaced."""
    thought = thought_of(row)
    thought.steps[-1] = replace(thought.steps[-1], **fields)
    return verdict_of(thought, row)


def test_a_candidate_may_be_named_once_only():
    twice = [*thought_of(PLAIN).steps[0].candidates, Candidate("ship", "red", SHIPS[0]["box"])]
    assert change(candidates=twice) == "wrong_candidate"


def test_two_equal_objects_are_two_candidates():
    row = dict(PLAIN, objects=[*SHIPS, dict(SHIPS[2])])
    assert (verdict_of(thought_of(row), row) == "ok"
            and change(row, candidates=thought_of(PLAIN).steps[0].candidates) == "missing_candidate")


def test_a_small_shift_of_a_candidate_is_no_lie_and_a_large_one_is():
    for shift, code in ((5.0, "ok"), (45.0, "wrong_candidate")):
        moved = [Candidate("ship", "blue", [350 + shift, 100.0, 410 + shift, 130.0]) if c.colour == "blue"
                 else c for c in thought_of(PLAIN).steps[0].candidates]
        assert change(candidates=moved) == code


def test_a_colour_that_the_annotation_does_not_know_is_not_refuted():
    row = dict(PLAIN, objects=[{**o, "colour": None} for o in SHIPS])
    painted = [replace(c, colour="green") for c in thought_of(row).steps[0].candidates]
    assert change(row, candidates=painted) == "ok" and change(candidates=painted) == "wrong_candidate"


def test_a_step_that_looks_for_something_else_is_misread_or_wrong():
    assert change(find=Target("ship", ["blue"])) == "misread"
    assert change(dict(PLAIN, expression="the leftmost red ship"),
                  find=Target("ship", [])) == "missing_candidate"


@pytest.mark.parametrize("words, code",
                         [("rightmost", "misread"), ("second from left", "misread"), ("left of", "misread")])
def test_a_step_may_only_use_a_cue_of_the_sentence(words, code):
    assert change(cue=Cue("relation" if words.endswith("of") else "order", words)) == code


def test_other_words_for_the_same_cue_are_fine():
    row = dict(KNOWN, expression="the white vehicle to the left of the bus")
    thought = thought_of(row)
    for words in ("left of", "to the left of", "to the left of it"):
        thought.steps[-1].cue.words = words
        assert verdict_of(thought, row) == "ok"


def test_what_is_too_close_to_say_may_be_left_or_not():
    row = dict(PLAIN, expression="the largest ship")
    thought = thought_of(row)
    assert thought.steps[0].left == [0] and verdict_of(thought, row) == "ok"
    thought.steps[0].left = [0, 1]
    assert verdict_of(thought, row) == "wrong_decision"


def test_nothing_may_be_claimed_where_the_objects_are_not_known_and_something_must_be_where_they_are():
    thought = thought_of(PLAIN)
    assert verdict_of(thought, dict(PLAIN, objects=None)) == "wrong_candidate"
    assert verdict_of(replace(thought, steps=[], decision=None), PLAIN) == "missing_candidate"
    assert verdict_of(replace(thought, steps=[], decision=None), dict(PLAIN, objects=None)) == "ok"


def test_boxes_in_the_frame_of_the_student_are_a_wrong_frame():
    row = dict(PLAIN, width=400, height=300, box=[100.0, 100, 160, 130], objects=SHIPS[:1])
    assert verdict_of(replace(thought_of(row), box=[250.0, 333.0, 400.0, 433.0]), row) == "wrong_frame"


def test_a_step_whose_candidates_are_what_an_earlier_step_left():
    row = dict(PLAIN, expression="the largest ship left of the rightmost ship",
               objects=[*SHIPS, dict(category="ship", colour="white", box=[200.0, 300, 210, 310])])
    thought = thought_of(row)
    assert [len(s.candidates) for s in thought.steps] == [4, 4, 3] and thought.steps[2].candidates == [
        thought.steps[1].candidates[k] for k in thought.steps[1].left]
    del thought.steps[2].candidates[1]
    assert verdict_of(thought, row) in ("missing_candidate", "wrong_outcome")


def test_no_thought_raises():
    """Fields that fit together, but not the row."""
    other = dict(PLAIN, expression="the bus", category="bus",
                 objects=[dict(category="bus", colour=None, box=[1.0, 2, 3, 4])])
    for row in (other, dict(other, objects=[]), dict(PLAIN, expression=""), dict(PLAIN, category=None),
                dict(PLAIN, expression="北京的桥")):
        assert verdict_of(thought_of(PLAIN), row) != "ok" or row["category"] is None
    odd = Step(Target("ship", []), Cue("relation", "between"), [], [], [])
    assert verdict_of(replace(thought_of(PLAIN), steps=[odd, *thought_of(PLAIN).steps]), PLAIN) == "misread"


# free text

@pytest.mark.parametrize("row", [ROW, KNOWN], ids=["objects unknown", "objects known"])
@pytest.mark.parametrize("thought", [
    "The bus is at the bottom; the minibus lies left of it. The minibus is at (150, 183).",
    "The minibus is at the bottom, around (150, 183). There are three vehicles.",
    "Given the size of the minibus, the box I answer with is small; it stands top left, at (150, 183), "
    "and the label on its roof cannot be read."])
def test_no_claim_of_free_text_is_judged(thought, row): assert codes(thought, row) == []


def test_free_text_that_gives_itself_away_is_dropped():
    assert codes("As annotated, the minibus is here.") == ["leak"]


BOX = "<answer>[125, 167, 175, 200]</answer>"

@pytest.mark.parametrize("text, code", [
    ("", "no_thought"), ("<think></think><answer></answer>", "no_thought"),
    (f"<think> \n </think>{BOX}", "no_thought"),
    (f"<think><think>the minibus</think></think>{BOX}", "no_thought"),
    (f"<THINK>the minibus</THINK>{BOX}", "no_thought"), (f"<think>the minibus</think>{BOX}{BOX}", "no_box"),
    (f"<think>the minibus</think>{BOX} Done.", "no_box"),
    ("<think>the minibus, top left (150, 183)", "no_box"),
    ("<think>the minibus</think><answer>[nan, 1, 2, 3]</answer>", "no_box"),
    ("<think>the minibus</think><answer>[1, 2, inf, 3]</answer>", "no_box"),
    ("<think>the minibus</think><answer>[١٢٥, ١٦٧, ١٧٥, ٢٠٠]</answer>", "no_box"),
    ("<think>the minibus</think><answer>[125.4, 166.9, 175.0, 200.2]</answer>", "ok"),
    ("<think>the minibus</think><answer>[175, 200, 125, 167]</answer>", "outside"),
    ("<think>the minibus</think><answer>[-125, 167, 175, 200]</answer>", "outside")])
def test_strange_texts(text, code): assert verdict(find_faults(text, ROW, GRID)) == code


pieces = st.lists(st.sampled_from(["<think>", "</think>", "<answer>", "</answer>", "[1, 2, 3, 4]",
                                   "(150, 183)", "the minibus ", "it ", "left of ", ". ", "İ", "x = 5 ",
                                   "NaN", "given "]), max_size=40).map("".join)

@settings(max_examples=300, deadline=None)
@given(st.one_of(st.text(max_size=300), pieces, pieces.map(lambda t: f"<think>{t}{END}")),
       st.sampled_from([ROW, KNOWN, dict(KNOWN, category=None), dict(ROW, expression="", category=None)]),
       st.sampled_from([GRID, PIXELS]))
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


@pytest.mark.parametrize("unit",
                         ["the minibus at (1, 2) left of it ", "given the box ", "the ", "( ", "1", " "])
def test_the_work_grows_with_the_length_not_its_square(unit):
    """Lines executed; what a pattern does inside is not counted, but it must come to its end."""
    def lines(length):
        return lines_run(lambda: find_faults(f"<think>{unit * (length // len(unit))}{END}", KNOWN, GRID))
    assert lines(40_000) < 6 * max(lines(10_000), 1000)  # 4 if linear, 16 if quadratic


# texts of authors who did not know the filters

BLIND = [json.loads(line)
         for line in (Path(__file__).parent / "blind_chains.jsonl").read_text(encoding="utf-8").splitlines()]
PLAIN_CODES = ("no_thought", "no_box", "outside", "wrong_frame", "wrong_box", "leak")
# recall and precision; 1 and 1 where nothing is said
MEASURED = {"dev": {}, "test": {"ok": (1, 0.976), "leak": (0.857, 1)}}

@pytest.mark.parametrize("half", ["dev", "test"])
def test_chains_of_another_author(half):
    """What the plain filters claim. Of 454 chains, those whose defect is a missing step, a place elsewhere or
    a contradiction are kept now: free text is not held to its claims. Failures of the half `dev` were read,
    of `test` only the numbers."""
    lines = [x for x in BLIND if x["half"] == half]
    found = [verdict(find_faults(x["text"], x, Codec(x["codec"], max_pixels=x["max_pixels"]))) for x in lines]
    truth = [x["defect"] if x["defect"] in PLAIN_CODES else "ok" for x in lines]
    table = {name: v[2:] for name, v in scores(truth, found).items()}
    assert set(table) == {"ok", *PLAIN_CODES}
    for name, now in table.items():
        assert all(m >= bar - 1e-3 for m, bar in zip(now, MEASURED[half].get(name, (1, 1)))), (name, now)


def test_sentences_written_before_the_patterns_were_read():
    """120 leaks and 140 honest texts, each in a chain that is right otherwise. Their failures were read and
    mended: this holds what was won, and says nothing of new texts."""
    sentences = json.loads((Path(__file__).parent / "claims.json").read_text(encoding="utf-8"))
    lines = [x for x in sentences["rows"] if x["defect"] in ("leak", "ok")]
    table = scores([x["defect"] for x in lines],
                   [verdict(find_faults(x["text"], sentences["scenes"][x["scene"]], Codec())) for x in lines])
    assert all(m >= bar - 1e-3 for name, bars in {"leak": (1, 1), "ok": (0.992, 0.972)}.items()
               for m, bar in zip(table[name][2:], bars)), table
