"""The grammar of positional language: against the scenes' own reader, sentences taken apart by hand, real
annotation files, and any text at all."""

import numpy as np
import pytest
from conftest import lines_run
from hypothesis import example, given, settings, strategies as st
from PIL import Image

from rsground_nb.data import load_folder
from rsground_nb.grammar import (CELLS, HALVES, LEXICON, ORDINALS, REGIONS, RELATIONS, Phrase, cues,
                                 direction, hops, in_region, parse_expression, region, split_words)

from rsground_nb.scenes import (RULES, SENTENCE, STYLES, cell_name, check_expression, expressions, make_scene,
                                place_words, scene_records)
from rsground_nb.sentences import count_hops

KINDS = ("order", "relation", "position", "size", "colour")


def parts(p):
    return (p.target, p.attributes, p.size, p.order, p.position,
            tuple((r.kind, tuple(map(parts, r.anchors))) for r in p.relations))


# Drawn scenes -----------------------------------------------------------------------------------------------

def expected(text):
    """What the pattern of reference/sentences reads in one of its own sentences."""
    said = SENTENCE.fullmatch(text).groupdict()
    noun = said["category"] or said["plural"].removesuffix("s")
    end = {"leftmost": "left", "rightmost": "right", "topmost": "top",
           "bottommost": "bottom"}.get(said["pick"] or said["end"]) or CELLS.get(said["corner"])
    order = (((("second", "third", "fourth").index(said["ordinal"]) + 2, said["start"]),) if said["ordinal"]
             else ((1, end),) if end else ())
    kind = {"left of": "left", "right of": "right", "nearest to": "near",
            "that is nearest to": "near"}.get(said["relation"], said["relation"])
    position = CELLS.get(said["place"], said["place"]) or (f"{said['half']} half" if said["half"] else "")
    size = "" if end else " ".join(w for w in (said["rank"], said["pick"]) if w)
    return (noun, (said["colour"],) if said["colour"] else (), size, order, position,
            ((kind, (expected(said["anchor"]),)),) if kind else ())


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 10**6), st.sampled_from(list(STYLES)))
def test_every_sentence_of_a_scene_is_read_completely_and_means_its_object(seed, style):
    scene = make_scene(np.random.default_rng(seed), style=style)
    for text, thing, _ in expressions(scene, RULES):
        p = parse_expression(text)
        assert not p.unknown and parts(p) == expected(text) and p.number == 1 and p.text == text
        assert check_expression(text, scene) == [thing] and hops(p) == count_hops(text, scene.categories)


@pytest.mark.parametrize("column", (-1, 0, 1))
@pytest.mark.parametrize("row", (-1, 0, 1))
def test_the_ninths_of_the_scenes_have_one_name_everywhere(column, row):
    words, box = place_words(column, row), [100 * (column + 1) + 40, 100 * (row + 1) + 40] * 2
    name = CELLS.get(cell_name(column, row), cell_name(column, row))
    assert (region(box, 300, 300) == cell_name(column, row)
            and parse_expression(f"the ship {words}").position == name)
    assert in_region(name, box, 300, 300)


# By hand ----------------------------------------------------------------------------------------------------

BY_HAND = [  # text, target, and what is not the default
    ("search the first basketball court from the upper left of some basketball courts that are on the center "
     "of the left and it is on the bottom of a tennis court and the right of a road", "basketball court",
     dict(order=((1, "upper left"),), position="centre of the left",
          relations=[("below", "tennis court"), ("right", "road")])),
    ("find three adjacent tennis courts on the far top and they are close to a pond", "tennis court",
     dict(number=3, attributes=("adjacent",), position="far top", relations=[("near", "pond")])),
    ("the largest gray storage tank on the lower right and it is between a road and a river", "storage tank",
     dict(size="largest", attributes=("gray",), position="lower right",
          relations=[("between", "road", "river")])),
    ("search the first baseball field from the left of some baseball fields that are on the right and the "
     "baseball field is in the upper left of a pond", "baseball field",
     dict(order=((1, "left"),), position="right", relations=[("upper left", "pond")])),
    ("search the first baseball field from the bottom of some baseball fields that are on the left of a lake",
     "baseball field", dict(order=((1, "bottom"),), relations=[("left", "lake")])),
    ("a roundabout on the center of far left and it is on the left a white building", "roundabout",
     dict(position="centre of the far left", relations=[("left", "building")])),
    ("a swimming pool in the middle part and it is surrounded by the buildings and on the top of "
     "another swimming pool", "swimming pool",
     dict(position="middle", relations=[("", "building"), ("above", "swimming pool")])),
    ("find a baseball field on the left and it is on the right of a river and woods", "baseball field",
     dict(position="left", relations=[("right", "river", "woods")])),
    ("The white minibus left of the bus", "minibus",
     dict(attributes=("white",), relations=[("left", "bus")])),
    ("A dam on the left of the image", "dam", dict(position="left")),
    ("The vehicle on the lower right of the brown ship", "vehicle",
     dict(relations=[("lower right", "ship")])),
    ("The small red car nearest to the top-left corner", "car",
     dict(size="small", attributes=("red",), order=((1, "upper left"),))),
    ("The second-largest tank in the row", "tank", dict(size="second largest", relations=[("", "row")])),
    ("The car closest to the bottom edge of the image", "car", dict(order=((1, "bottom"),))),
    ("The car closest to the red car", "car", dict(relations=[("near", "car")])),
    ("The nearest car to the bus", "car", dict(relations=[("near", "bus")])),
    ("The middle car of the five", "car", dict(order=((1, "middle"),))),
    ("The tree crown furthest to the right", "tree crown", dict(order=((1, "right"),))),
    ("The left-most U-shaped building", "building", dict(order=((1, "left"),), attributes=("u-shaped",))),
    ("The vehicle immediately to the upper right of the bus and the truck", "vehicle",
     dict(relations=[("upper right", "bus", "truck")])),
    ("The car right next to the bus", "car", dict(relations=[("near", "bus")])),
    ("The gray and white harbor at the top-middle of the picture", "harbor",
     dict(attributes=("gray", "white"), position="centre of the top")),
    ("The large vehicle located at the bottom-most position.", "vehicle",
     dict(size="large", order=((1, "bottom"),))),
    ("the expressway service area north-east of the overpass", "expressway service area",
     dict(relations=[("upper right", "overpass")])),
    ("The second of the three ships from the left", "ship", dict(order=((2, "left"),))),
    ("the last plane from the top", "plane", dict(order=((-1, "top"),))),
    ("The only dead tree crown in the image", "tree crown", dict(attributes=("only", "dead"))),
    ("the buses near the right edge", "bus", dict(position="right")),
    ("The second small-vehicle from the left", "vehicle", dict(order=((2, "left"),), size="small")),
    ("the upper of the two adjacent ships", "ship", dict(order=((1, "top"),), attributes=("adjacent",))),
    ("both planes near the terminal", "plane", dict(number=2, relations=[("near", "terminal")])),
    ("the 3 cars on the left", "car", dict(number=3, position="left")),
    ("the building with a red roof on the right", "building",
     dict(position="right", relations=[("", "roof")])),
    ("the building that has a blue roof", "building", dict(relations=[("", "roof")])),
    ("the white car among the red cars", "car", dict(attributes=("white",), relations=[("", "car")])),
    ("the ship that is larger than the white ship", "ship", dict(size="larger", relations=[("", "ship")])),
    ("the plane at the left end of the runway", "plane", dict(relations=[("", "runway")])),
    ("the plane on the left side of the runway", "plane", dict(relations=[("left", "runway")])),
    ("the car on the very left", "car", dict(position="far left")),]


@pytest.mark.parametrize("text, target, said", BY_HAND)
def test_sentences_taken_apart_by_hand(text, target, said):
    p = parse_expression(text)
    found = {k: getattr(p, k) for k in ("number", "attributes", "position", "order", "size", "unknown")}
    assert p.target == target and found == dict(dict(number=1, attributes=(),
                                                     position="", order=(), size="", unknown=()),
                                                **{k: v for k, v in said.items() if k != "relations"})
    assert [(r.kind, *(a.target for a in r.anchors)) for r in p.relations] == said.get("relations", [])


def test_a_place_after_an_anchor_belongs_to_the_anchor_and_after_and_to_the_target():
    inner, outer = (parse_expression("the ship left of the tank in the top left"),
                    parse_expression("the ship left of the tank and in the top left"))
    assert ((inner.position, inner.relations[0].anchor.position) == ("", "upper left")
            and (outer.position, outer.relations[0].anchor.position) == ("upper left", ""))


@pytest.mark.parametrize("text, unknown",
                         [("the zeppelin", ("zeppelin",)),
                          ("the bridge that crosses the river", ("crosses", "river")),
                          ("the samll ship", ("samll",)), ("the ship left of", ("left", "of")),
                          ("the ship left of the zeppelin", ("zeppelin",)),
                          ("the ship on the left in the middle", ("in", "the", "middle")),
                          ("das Schiff", ("das", "schiff")), ("船", ("船",)), ("", ())])
def test_what_is_not_understood_is_listed(text, unknown): assert parse_expression(text).unknown == unknown


@pytest.mark.parametrize("text, target, unknown, attributes", [
    ("the car which is not red", "car", ("not", "red"), ()),
    ("the car that is not red but white", "car", ("not", "red"), ("white",)),
    ("Not the red car, the bus", "", ("not", "the", "red", "car", "bus"), ()),
    ("the white ship without a red deck, near the pier", "ship", ("without", "a", "red", "deck"), ("white",)),
    ("the bridge from the top left of the river", "bridge", (), ()),
    ("a road from the top to the bottom", "road", ("from", "the", "top"), ())])
def test_what_is_denied_is_not_taken_for_the_target(text, target, unknown, attributes):
    p = parse_expression(text)
    assert (p.target, p.unknown, p.attributes) == (target, unknown, attributes)


@pytest.mark.parametrize("text, found", [
    ("the second red car from the left", [("order", "second from the left"), ("colour", "red")]),
    ("the leftmost ship", [("order", "leftmost")]),
    ("the car left of the largest bus", [("relation", "left of"), ("size", "largest")]),
    ("A dam on the left of the image", [("position", "on the left of the image")]),
    ("The Car Closest To The Bottom Right Corner", [("order", "closest to the bottom right corner")]),
    ("the middle car of the five", [("order", "middle")]),
    ("the upper right plane", [("position", "upper right")]), ("next to", [("relation", "next to")]),
    ("fourth", [("order", "fourth")]), ("the windmill", []), ("", [])])
def test_cues_come_in_reading_order_with_their_words(text, found): assert cues(text) == found


# Any text ---------------------------------------------------------------------------------------------------

WORDS = sorted({w for words in LEXICON.values() for w in words.split()}
               | {*RELATIONS, "zeppelin", ",", ".", "(", "12", "left-most", "top-left", "'", "é", "的"})
TEXTS = st.one_of(st.text(max_size=60), st.lists(st.sampled_from(WORDS), max_size=25).map(" ".join))


@settings(max_examples=400, deadline=None)
@given(TEXTS)
@example("from the left of the from the left of")
@example("nearest nearest to the second")
@example("center of the center of the left")
@example("\x00\ud800 İ ß")
def test_no_text_breaks_the_grammar(text):
    p, words = parse_expression(text), split_words(text)
    assert (isinstance(p, Phrase) and p.text == text and p.number >= 1
            and (p.position == "" or p.position in REGIONS | HALVES) and set(p.unknown) <= set(words))
    assert (all(k in KINDS and w and w == w.lower() for k, w in cues(text))
            and all(r.anchors and r.words and r.anchor.target for r in p.relations))
    assert all(k in (*ORDINALS.values(), 1) and (side == "" or side in REGIONS | HALVES)
               for k, side in p.order)


@settings(max_examples=100, deadline=None)
@given(st.lists(st.sampled_from([w for w in WORDS if w.isascii() and w.isalpha()]), max_size=20))
def test_case_spaces_and_a_full_stop_do_not_matter(words):
    plain = parse_expression(" ".join(words))
    assert all(parts(parse_expression(other)) == parts(plain) and parse_expression(other).unknown
               == plain.unknown for other in ("  ".join(words).upper(), f"\t{' '.join(words).title()}.\n"))


@pytest.mark.parametrize("reading", (parse_expression, cues))
@pytest.mark.parametrize("text", ("the ", "on ", "very ", "side ", "left of ", "left of the bus ",
                                  "on the ", "and ", "a pond and ", "center of the ", "nearest to ",
                                  "from the left of the ", "zeppelin ", "second ", "of ", "- ", "x"))
def test_work_grows_no_faster_than_the_text(reading, text):
    """Lines executed on n and on 2n repetitions."""
    def lines(n): return lines_run(lambda: reading(text * n))
    assert lines(400) <= 2.2 * lines(200) + 100


# Regions ----------------------------------------------------------------------------------------------------

@settings(max_examples=300, deadline=None)
@given(st.tuples(*[st.floats(-50, 2000)] * 4), st.integers(1, 1500), st.integers(1, 1500))
@example((1.0, 1.0, 1.0, 1.0), 3, 3)
@example((0, 0, 2, 4), 3, 3)
def test_a_box_is_where_its_ninth_says(box, width, height):
    name = region(box, width, height)
    assert in_region(name, box, width, height) and in_region(CELLS.get(name, name), box, width, height)


def test_regions_are_mirror_images_and_far_is_farther():
    for name, (x1, y1, x2, y2) in REGIONS.items():
        across = " ".join({"left": "right", "right": "left"}.get(w, w) for w in name.split())
        assert REGIONS[across] == pytest.approx((1 - x2, y1, 1 - x1, y2) if across != name
                                                else (x1, y1, x2, y2))
        if "far" in name:
            assert np.prod(np.diff(np.reshape(REGIONS[name], (2, 2)), axis=0)) < np.prod(
                np.diff(np.reshape(REGIONS[name.replace("far ", "")], (2, 2)), axis=0))
        assert direction(split_words(name), 0) == (name, len(name.split()))
    assert all(0 <= v <= 1 for r in REGIONS.values() for v in r)


def test_slack_widens_and_an_unknown_position_is_named():
    assert not in_region("left", (43, 0, 43, 9), 100, 100) and in_region("left", (43, 0, 43, 9), 100, 100,
                                                                         slack=0.05)
    with pytest.raises(ValueError, match="unknown position 'uphill': use one of upper left"):
        in_region("uphill", (0, 0, 1, 1), 2, 2)


# Hops and halves

HOPS = [("the red ship", 1), ("the plane", 1), ("the leftmost red ship", 1), ("the largest ship", 1),
        ("the ship in the top left", 1), ("the second red ship from the left", 1),
        ("the ship nearest to the top left corner", 1),
        ("the leftmost of the three ships", 1), ("the ship left of the yellow tank", 2),
        ("the ship nearest to the red tank", 2), ("the ship left of the largest vehicle", 2),
        ("the second largest plane in the left half", 2), ("the rightmost ship in the bottom half", 2),
        ("the plane above the vehicle that is nearest to the largest ship", 3),
        ("the ship left of the tank nearest to the plane", 3), ("the largest ship left of the red plane", 3),
        ("the ship right of the largest tank in the left half", 3),
        ("the ship between the pond and the largest tank", 3)]


@pytest.mark.parametrize("text, steps", HOPS)
def test_hops_are_counted(text, steps): assert hops(parse_expression(text)) == steps


def test_hops_of_drawn_scenes_are_those_of_the_sentence_rules(monkeypatch):
    monkeypatch.setattr("rsground_nb.scenes.draw_scene", lambda scene, rng: Image.new("RGB", (2, 2)))
    for row in scene_records(60, 1, hops=(1, 2, 3)):
        assert (hops(parse_expression(row["expression"])) == row["hops"]
                and not parse_expression(row["expression"]).unknown), row["expression"]


def test_that_is_nearest_to_belongs_to_the_noun_before():
    (relation,) = (parse_expression("the plane above the vehicle that is nearest to the largest ship")
                   .relations)
    assert (relation.kind == "above" and relation.anchor.relations[0].words == "nearest to"
            and relation.anchor.relations[0].anchor.size == "largest")
    on_the_target = parse_expression("the plane above the vehicle which is on the right")
    assert on_the_target.position == "right" and on_the_target.relations[0].anchor.position == ""


@pytest.mark.parametrize("side, other",
                         [("left", "western"), ("right", "right"), ("top", "upper"), ("bottom", "lower")])
def test_a_half_is_a_region(side, other):
    for words in (f"in the {side} half", f"in the {other} half of the image"):
        assert parse_expression(f"the largest ship {words}").position == f"{side} half"
    box = {"left": (45, 50, 47, 52), "right": (53, 50, 55, 52), "top": (50, 45, 52, 47),
           "bottom": (50, 53, 52, 55)}[side]
    assert in_region(f"{side} half", box, 100, 100) and not in_region(side, box, 100, 100)
    assert parse_expression(f"the ship on the {side} half of the runway").position == ""


# Real files -------------------------------------------------------------------------------------------------

def test_99_of_100_expressions_of_rsvg_hr_are_read_completely(shared):
    for split, n in (("train", 2151), ("test", 499)):
        texts = [line.split(",", 5)[5]
                 for line in (shared / "rsvg_hr" / f"rsvg_hr_{split}.txt").read_text().splitlines()]
        read = [parse_expression(t) for t in texts]
        assert (len(texts) == n and np.mean([not p.unknown for p in read]) >= 0.99
                and all(p.target for p in read))
        assert (np.mean([bool(p.position) for p in read]) >= 0.99
                and np.mean([bool(p.relations) for p in read]) >= 0.85)


def test_words_and_boxes_of_rsvg_hr_agree(shared):
    splits, _ = load_folder(shared / "rsvg_hr")
    rows = {split: [(parse_expression(r["expression"]).position, r) for r in d.remove_columns("image")]
            for split, d in splits.items()}
    assert sum(map(len, rows.values())) == 2648
    for split, lowest in (("train", 0.98), ("test", 0.985)):
        agree = [in_region(where, r["box"], r["width"], r["height"]) for where, r in rows[split] if where]
        assert np.mean(agree) >= lowest
    turned = [in_region(where, [1024 - r["box"][k] for k in (2, 3, 0, 1)], 1024, 1024)
              for where, r in rows["test"] if where != "middle"]
    assert np.mean(turned) < 0.1  # the picture upside down: the words are false


def test_every_text_of_aerial_mini_is_read_completely_and_its_positions_are_true(shared):
    splits, _ = load_folder(shared / "aerial_mini")
    rows = [(parse_expression(r["expression"]), r) for d in splits.values()
            for r in d.remove_columns("image")]
    assert len(rows) == 282 and not [p for p, _ in rows if p.unknown or not p.target]
    placed = [(p, r) for p, r in rows if p.position]
    assert len(placed) > 40 and all(in_region(p.position, r["box"], r["width"], r["height"])
                                    for p, r in placed)
