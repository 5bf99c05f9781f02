"""Thoughts of the rule teacher: each field is held against the boxes by geometry of this file, and
the text against the Thought."""
import json
import re
from collections import Counter
from dataclasses import replace

import jsonschema
import numpy as np
import pytest
from hypothesis import given, settings, strategies as st
from PIL import Image

from rsground_nb import scenes
from rsground_nb.boxes import Codec, iou, parse_completion
from rsground_nb.cot import (PLACES, STYLES, Candidate, Cue, Draft, Step, Target, Thought, make_thought,
                             render, rule_drafts, stated)
from rsground_nb.cues import outcomes, ranked, read_cue
from rsground_nb.data import load_folder, split_hash, to_dataset
from rsground_nb.filters import find_faults
from rsground_nb.grammar import hops, parse_expression
from rsground_nb.scenes import STYLES as SCENES, scene_records
from rsground_nb.thoughts import THOUGHT_SCHEMA, from_json, to_json

PIXELS, GRID = Codec("qwen2_5_vl", max_pixels=112 * 112), Codec("qwen3_vl")


@pytest.fixture(scope="module")
def rows():
    """60 rows of each style of scene, a third of each number of hops; nothing is drawn."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(scenes, "draw_scene", lambda scene, rng: Image.new("RGB", (2, 2)))
        return [{k: v for k, v in r.items() if k != "image"} for style in SCENES
                for r in scene_records(60, 3, 112, style=style, hops=(1, 2, 3))]


# an independent reading: exact comparisons of centres, without margins

def middle(box): return (box[0] + box[2]) / 2, (box[1] + box[3]) / 2

SIDES = {"left": (0, 1), "right": (0, -1), "top": (1, 1), "bottom": (1, -1)}
RANK = {"second": 1, "third": 2, "fourth": 3}


def in_place(words, box, row):
    x, y = (c / s for c, s in zip(middle(box), (row["width"], row["height"])))
    if words.endswith(" half"):
        axis, sign = SIDES[words.split()[0]]
        return sign * (0.5 - (x, y)[axis]) > 0
    here = {"left": 3 * x < 1, "right": 3 * x > 2, "top": 3 * y < 1, "bottom": 3 * y > 2}
    return not any(here.values()) if words == "centre" else all(here[w] for w in words.split())


def expected(cue, boxes, anchor, row):
    """For each box True, False, or None where a box is not enough to say (sizes)."""
    words, size = cue.words, (row["width"], row["height"])
    if cue.kind == "position": return [in_place(words, box, row) for box in boxes]
    if cue.kind == "size": return [None] * len(boxes)
    if cue.kind == "order":
        if words.startswith("nearest to "):
            corner = [s * (w in words) for s, w in zip(size, ("right", "bottom"))]
            away = [np.hypot(*np.subtract(middle(b), corner)) for b in boxes]
            return [a == min(away) for a in away]
        axis, sign = SIDES[words.removesuffix("most").split()[-1]]
        order = sorted(sign * middle(b)[axis] for b in boxes)
        return [sign * middle(b)[axis] == order[RANK.get(words.split()[0], 0)] for b in boxes]
    others = [b for b in boxes if b != anchor]
    if words == "nearest to":
        away = {id(b): np.hypot(*np.subtract(middle(b), middle(anchor))) for b in others}
        return [b != anchor and away[id(b)] == min(away.values()) for b in boxes]
    axis, sign = {"left of": SIDES["left"], "right of": SIDES["right"], "above": SIDES["top"],
                  "below": SIDES["bottom"]}[words]
    return [sign * (middle(anchor)[axis] - middle(b)[axis]) > 0 if b != anchor else False for b in boxes]


def test_every_field_of_every_thought_is_true_and_there_is_one_step_a_hop(rows):
    kinds = Counter()
    for row in rows:
        thought = make_thought(row, GRID)
        assert len(thought.steps) == row["hops"] == hops(parse_expression(row["expression"])), row[
            "expression"]
        for step in thought.steps:
            there = [dict(category=c.category, colour=c.colour, box=c.box) for c in step.candidates]
            named = [o for o in row["objects"] if o["category"] == step.find.category
                     and all(a == o["colour"] for a in step.find.attributes)]
            assert all(o in named for o in there) and step.left, row["expression"]
            earlier = [[s.candidates[k] for k in s.left] for s in thought.steps if s is not step
                       and s.find == step.find]
            assert len(there) == len(named) or step.candidates in [
                sorted(e, key=step.candidates.index) for e in earlier if e[0] in step.candidates]
            if not step.cue: continue
            kinds[step.cue.kind] += 1
            anchor = (thought.steps[step.anchors[0]].candidates[thought.steps[step.anchors[0]].left[0]].box
                      if step.anchors else None)
            for k, holds in enumerate(expected(step.cue, [c.box for c in step.candidates], anchor, row)):
                assert holds is not False or k not in step.left, (row["expression"], step)
        assert (thought.steps[-1].left == [thought.decision]
                and thought.steps[-1].candidates[thought.decision].box == row["box"] == thought.box)
    assert set(kinds) == {"order", "relation", "position", "size"} and min(kinds.values()) > 5


@pytest.mark.parametrize("style", STYLES)
@pytest.mark.parametrize("places", PLACES)
def test_the_text_tells_the_thought_in_order_and_ends_with_the_box(rows, style, places):
    for row in rows[::3]:
        thought = make_thought(row, PIXELS)
        text = render(thought, PIXELS, 112, 112, style, places)
        parsed = parse_completion(text)
        assert parsed.reason == "ok" and parsed.box == PIXELS.encode(row["box"], 112, 112)
        said = parsed.thinking.lower()
        told = [*(c.words for c in thought.cues), *(s.cue.words for s in thought.steps if s.cue),
                said.split()[-1]]
        places_of_words = [said.find(w) for w in told]
        assert min(places_of_words) > 0 and all(said.count(s.find.category) for s in thought.steps)
        assert not re.search(r"[0-9]", said[:said.index(thought.steps[0].find.category,
                                                        said.index("."))]), "a place before the candidates"


def test_places_in_the_thought_are_those_of_the_candidates(rows):
    for row in rows[::2]:
        thought = make_thought(row, GRID)
        text = render(thought, GRID, 112, 112, places="cells")
        known = {"".join(str(min(9, int(10 * c / 112))) for c in middle(c.box)) for s in thought.steps
                 for c in s.candidates}
        assert set(re.findall(r"\b\d\d\b", text.split("</think>")[0])) == known
        assert text.split("</think>")[0].endswith(
            "take {}{}.".format(*(min(9, int(10 * c / 112)) for c in middle(row["box"]))))


def test_what_comes_before_the_candidates_depends_on_the_sentence_only(rows):
    """Another target for the same sentence changes nothing before the first candidates:
    nothing leaks from the answer."""
    for row in rows[::3]:
        head = render(make_thought(row, GRID), GRID, 112, 112).split(".")
        shift = [v + 1 for v in row["box"]]
        moved = {**row, "box": shift,
                 "objects": [{**o, "box": shift} if o["box"] == row["box"] else o for o in row["objects"]]}
        try: other = render(make_thought(moved, GRID), GRID, 112, 112).split(".")
        except ValueError: continue
        assert head[:1 + bool(stated(parse_expression(row["expression"])))] == other[
            :1 + bool(stated(parse_expression(row["expression"])))]


# JSON

def test_every_thought_goes_through_json_and_fits_the_schema(rows):
    validator = jsonschema.Draft202012Validator(THOUGHT_SCHEMA)
    for row in rows[::3]:
        for thought in (make_thought(row, GRID), make_thought({**row, "objects": None}, GRID)):
            assert from_json(to_json(thought)) == thought
            validator.validate(json.loads(to_json(thought)))


def test_the_schema_is_closed_and_all_fields_are_required():
    for name, part in [("Thought", THOUGHT_SCHEMA), *THOUGHT_SCHEMA["$defs"].items()]:
        assert (part["additionalProperties"] is False
                and sorted(part["required"]) == sorted(part["properties"])), name


SHIP = [10.0, 10.0, 20.0, 20.0]
GOOD = Thought(Target("ship", []), [Cue("relation", "left of tank")],
               [Step(Target("tank", []), None, [], [Candidate("tank", None, [50.0, 10.0, 60.0, 20.0])], [0]),
                Step(Target("ship", []), Cue("relation", "left of"), [0],
                     [Candidate("ship", "red", SHIP), Candidate("ship", None, [80.0, 10.0, 90.0, 20.0])],
                     [0])], 0, SHIP)


def spoil(path, value):
    data = json.loads(to_json(GOOD))
    *way, last = path
    place = data
    for key in way: place = place[key]
    if value is KeyError: del place[last]
    else: place[last] = value
    return json.dumps(data)


@pytest.mark.parametrize("path, value, message", [
    (["target"], KeyError, "target: Field required"),
    (["steps", 1, "candidates", 1, "box"], ["80", 10, 90, 20],
     r"steps\[1\].candidates\[1\].box\[0\]: .*number.*'80'"), (["box"], [1, 2, 3], "box: "),
    (["box"], [1, 2, 3, float("nan")], "box"), (["cues", 0, "kind"], "colour", r"cues\[0\].kind: .*'colour'"),
    (["steps", 0, "why"], "x", r"steps\[0\].why: "),
    (["steps", 1, "left"], [2], r"steps\[1\].left: 2 is not an index into 2 candidates"),
    (["steps", 1, "left"], [-1], r"steps\[1\].left: -1"),
    (["steps", 1, "anchors"], [1], r"steps\[1\].anchors: 1 is not an index into 1 earlier steps"),
    (["steps", 0, "left"], [], r"steps\[1\].anchors: step 0 leaves 0 candidates, not one"),
    (["decision"], None, "decision: must be null without steps"),
    (["decision"], 2, "decision: 2 is not an index into 2"),
    (["steps"], [], "decision: must be null without steps"), (["decision"], "0", "decision: "),
    (["decision"], True, "decision: "),
    (["steps", 1, "left"], [0, 0], r"steps\[1\].left: .* repeats an index"),
    (["box"], [10, 10, 5, 20], "box: "),
    (["steps", 0, "candidates", 0, "box"], [9, 9, 9, 9], r"steps\[0\].candidates\[0\].box: ")])
def test_what_is_no_thought_names_its_field(path, value, message):
    with pytest.raises(ValueError, match=message): from_json(spoil(path, value))


@pytest.mark.parametrize("text", ["", "{", "[]", "null", "3", '{"target": 1}', "{}"])
def test_other_json_is_refused(text):
    with pytest.raises(ValueError): from_json(text)


# objects not known

def test_without_objects_nothing_is_said_of_other_objects(rows):
    for row in rows[::2]:
        thought = make_thought({**row, "objects": None}, GRID)
        text = parse_completion(render(thought, GRID, 112, 112)).thinking
        assert (thought.steps == [] and thought.decision is None and len(re.findall(r"\d+", text)) == 1
                and text.split()[-2] == "take")
        assert find_faults(render(thought, GRID, 112, 112), {**row, "objects": None}, GRID,
                           thought=thought) == []


def test_real_crops_are_written_whole(shared):
    for part in load_folder(shared / "aerial_mini")[0].values():
        for codec in (Codec("qwen2_5_vl"), GRID):
            for row, draft in zip(part.remove_columns("image"), rule_drafts(part, codec)):
                parsed = parse_completion(draft.completion)
                assert draft.trouble == "" and parsed.box == codec.encode(row["box"], row["width"],
                                                                          row["height"])
                assert any(w in parsed.thinking for w in ("car", "vehicle", "bus", "tree"))


def test_long_sentences_over_maps_are_written_or_refused_with_a_reason(shared):
    for part in load_folder(shared / "rsvg_hr")[0].values():
        drafts = rule_drafts(part, GRID)
        assert (all("leaves the image" in d.trouble for d in drafts if not d.completion)
                and sum(bool(d.trouble) for d in drafts) <= 4)


# what a cue asks for

@pytest.mark.parametrize("kind, words, asked", [
    ("order", "leftmost", ("left", 1)), ("order", "second from right", ("right", 2)),
    ("order", "nearest to top left corner", ("upper left", 1)), ("order", "last from left", ("left", -1)),
    ("order", "first", ("", 0)), ("size", "largest", ("largest", 1)),
    ("size", "second smallest", ("smallest", 2)), ("size", "small", ("", 0)),
    ("position", "bottom right", ("lower right", 0)), ("position", "left half", ("left half", 0)),
    ("position", "centre", ("middle", 0)), ("relation", "left of", ("left", 0)),
    ("relation", "to the left of it", ("left", 0)), ("relation", "nearest to", ("nearest", 1)),
    ("relation", "near", ("", 0)), ("relation", "between", ("", 0)), ("relation", "in front of", ("", 0)),
    ("name", "red ship", ("", 0)), ("order", "", ("", 0)), ("size", "dingsbums", ("", 0))])
def test_a_cue_is_read_from_its_words(kind, words, asked): assert read_cue(kind, words) == asked


@given(st.lists(st.integers(0, 30).map(lambda v: (float(v),)), max_size=6), st.integers(1, 6))
def test_a_clear_rank_is_the_sorted_one(values, rank):
    found = ranked(values, 2.0, rank)
    order = sorted(values)
    assert found.count(True) <= 1 and all(holds is not True or (rank <= len(values) and v == order[rank - 1])
                                          for v, holds in zip(values, found))
    if rank <= len(values): assert any(holds is not False for holds in found)
    if len(values) == 1: assert found == [rank == 1]


def test_a_size_that_the_boxes_cannot_settle_is_left_open():
    boxes = [[0, 0, 10, 10], [0, 0, 10, 10.4], [0, 0, 30, 30]]
    assert outcomes(Cue("size", "largest"), boxes, [], (112, 112)) == [False, False, True]
    assert outcomes(Cue("size", "smallest"), boxes, [], (112, 112)) == [None, None, False]


def test_an_anchor_is_no_candidate_of_its_own_relation():
    boxes = [[0, 0, 10, 10], [40, 0, 50, 10], [90, 0, 100, 10]]
    assert outcomes(Cue("relation", "nearest to"), boxes, [boxes[1]], (112, 112))[1] is False
    assert outcomes(Cue("relation", "left of"), boxes, [boxes[1]], (112, 112)) == [True, False, False]


# what a sentence says and what is found

def one(expression, box=(40, 40, 60, 60), category="car", **more):
    return dict(expression=expression, box=[float(v) for v in box], width=112, height=112, category=category,
                expression_id="x", **more)


def chain_of(row, codec=PIXELS): return render(make_thought(row, codec), codec, row["width"], row["height"])


def thing(category, colour, *box): return dict(category=category, colour=colour, box=[float(v) for v in box])


CAR, BUS, TRUCK = thing("car", "blue", 40, 40, 60,
                        60), thing("bus", None, 90, 40, 110, 60), thing("truck", None, 3, 40, 20, 60)


def test_a_position_that_the_box_refutes_is_quoted_and_makes_no_step():
    for objects in (None, [thing("car", None, 90, 5, 100, 15), thing("car", None, 5, 5, 15, 15)]):
        thought = make_thought(one("the car on the left", (90, 5, 100, 15), objects=objects), PIXELS)
        assert [c.words for c in thought.cues] == ["left"] and not any(s.cue for s in thought.steps)


@pytest.mark.parametrize("expression, objects, steps", [
    ("the vehicle left of the bus", [CAR, BUS, thing("car", None, 90, 10, 99, 19)], 2),
    ("the car left of the red car", [CAR, thing("car", "red", 80, 40, 100, 60)], 2),
    ("the car right of the truck and left of the bus", [CAR, BUS, TRUCK], 4),
    ("the car nearest to the bottom right corner", [CAR, thing("car", None, 3, 3, 13, 13)], 1),
    ("the car left of the buses", [CAR, BUS], 2),
    ("the car left of the largest bus", [CAR, BUS, thing("bus", None, 90, 70, 110, 90)], 2),
    ("the car between the bus and the truck", [CAR, BUS, TRUCK], 1),
    ("the car near the bus", [CAR, BUS], 1), ("the car left of the crane", [CAR, BUS], 1),
    ("the car left of the bus", [CAR, BUS, thing("bus", None, 90, 70, 110, 90)], 1)])
def test_cues_make_a_step_where_the_boxes_can_show_them(expression, objects, steps):
    row = one(expression, objects=objects)
    thought = make_thought(row, PIXELS)
    assert len(thought.steps) == steps and thought.steps[-1].left == [thought.decision]
    assert find_faults(chain_of(row), row, PIXELS, thought=thought) == []


def test_a_sentence_that_means_two_objects_is_not_decided():
    row = one("the car", objects=[CAR, thing("car", None, 3, 3, 13, 13)])
    thought = make_thought(row, PIXELS)
    assert thought.steps[-1].left == [0, 1] and [
        f.code for f in find_faults(chain_of(row), row, PIXELS, thought=thought)] == ["wrong_decision"]


def test_a_colour_that_the_sentence_denies_is_not_given_to_the_target():
    assert "red" not in chain_of(one("the car that is not red",
                                     objects=[CAR, thing("car", "red", 80, 80, 90, 90)]))


@pytest.mark.parametrize("expression, category, said",
                         [("Das rote Haus in Zürich", "building", "target: building."),
                          ("北京的桥", None, "北京的桥"), ("The gizmo", None, "target: gizmo."),
                          ("three adjacent tennis courts", None, "target: adjacent tennis courts."),
                          ("the one on the left", None, "target: object.")])
def test_what_is_not_understood_is_called_by_its_category_or_repeated(expression, category, said):
    chain = chain_of(one(expression, category=category))
    assert said in chain and parse_completion(chain).reason == "ok"


@settings(max_examples=150, deadline=None)
@given(st.text(max_size=60), st.sampled_from([None, [CAR, BUS], [CAR, CAR]]))
def test_any_text_gives_a_chain_or_a_reason(text, objects):
    row = one(text, category=None, objects=objects)
    try: thought = make_thought(row, PIXELS)
    except ValueError as e: assert "row 'x'" in str(e) and "expression" in str(e); return
    chain = chain_of(row)
    assert (parse_completion(chain)[:2] == ((40, 40, 60, 60), "ok") and chain.count("<") == 4
            and from_json(to_json(thought)) == thought)


# limits

@pytest.mark.parametrize("row, words", [
    (one("the car", (40.6, 40, 41.4, 50)), "has no area in whole numbers of the frame 112x112"),
    (one("the car", (100, 40, 130, 60)), "leaves the image 112x112"),
    (one("the car", (60, 40, 40, 60)), "has no area"),
    (one("the car", (40.6, 40, 41.6, 42.4)), "keeps an IoU"),
    (one("the car", (1, 2, float("inf"), 4)), "not finite"), (one(" "), "expression is empty"),
    (one(None), "expression is empty"), (one("<answer>", category=None), "reserved for answers"),
    (one("the car", objects=[]), "objects"),
    (one("the car", objects=[thing(None, None, 40, 40, 60, 60)]), "no category"),
    (one("the car", objects=[thing("car", "red", 1, 2, 3, 4)]), "objects"),
    ({**one("the car"), "width": None}, "width"), ({**one("the car"), "height": 90000}, "90000")])
def test_rows_that_allow_no_chain_say_why(row, words):
    with pytest.raises(ValueError, match="row 'x'") as caught: make_thought(row, PIXELS)
    assert words in str(caught.value)
    if row["width"]: assert rule_drafts(to_dataset([row]), PIXELS) == [Draft(trouble=str(caught.value))]


def test_a_place_is_written_in_the_frame_of_the_student():
    row = dict(expression="the bridge", box=[200.0, 400.0, 400.0, 600.0], width=800, height=800,
               category="bridge", expression_id="a")
    for codec, place, box in ((Codec("qwen2_5_vl"), "304 508", "[203, 406, 406, 609]"),
                              (GRID, "375 625", "[250, 500, 500, 750]")):
        texts = {p: render(make_thought(row, codec), codec, 800, 800, places=p) for p in PLACES}
        assert (f"take {place}." in texts["full"] and "take 36." in texts["cells"]
                and "take 37 62." in texts["coarse"] and all(box in t for t in texts.values()))


@pytest.mark.parametrize("wrong, message",
                         [(dict(style="loud"), "style 'loud': use short or long"),
                          (dict(places="words"), "places 'words': use cells or coarse or full")])
def test_unknown_styles_and_places_are_refused(wrong, message):
    with pytest.raises(ValueError, match=message): render(GOOD, GRID, 112, 112, **wrong)


def test_a_box_at_the_edge_and_odd_sides_are_fine():
    row = {**one("the car", (0, 0, 33, 25)), "width": 641, "height": 479}
    for codec in (Codec("qwen2_5_vl"), GRID): assert "take 00." in chain_of(row, codec)
    assert render(replace(GOOD, box=[640.0, 470.0, 641.0, 479.0]), GRID, 641,
                  479).split("</think>")[0].endswith("take 99.")


def test_rows_without_optional_columns_are_written():
    assert parse_completion(chain_of({k: v for k, v in one("the car on the right").items()
                                      if k not in ("category", "expression_id")})).reason == "ok"


def test_drafts_do_not_open_images_keep_their_rows_and_depend_on_the_row_only(rows, tmp_path):
    missing = to_dataset([dict(one("the car"), image=str(tmp_path / "missing.png"), image_id="a")])
    before = split_hash(missing)
    assert (rule_drafts(missing, PIXELS)[0].completion and split_hash(missing) == before
            and rule_drafts(missing.select([]), PIXELS) == [])
    some = to_dataset(rows[:40])
    drafts = rule_drafts(some, PIXELS)
    assert rule_drafts(some.select([30, 3, 12]), PIXELS) == [drafts[k] for k in (30, 3, 12)]
    for draft, row in zip(drafts, rows):
        assert iou(PIXELS.decode(parse_completion(draft.completion).box, 112, 112), row["box"]) >= 0.5
