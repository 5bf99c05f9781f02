"""Scenes of every style: sentences against the checker, masks and boxes against the pixels, seeds, limits."""
import hashlib
import io
import os
import re
import subprocess
import sys
from dataclasses import replace
from itertools import combinations

import numpy as np
import pytest
import shapely
from hypothesis import given, settings, strategies as st
from PIL import Image
from shapely import Polygon

from rsground_nb.boxes import iou
from rsground_nb.shapes import decode_mask, mask_box
from rsground_nb.sentences import count_hops
from rsground_nb.scenes import (COLOURS, RULES, SENTENCE, SHAPES, STYLES, SURE, TONES, Scene, Style, Thing,
                                check_expression, clear_boxes, describe, draw_scene, expressions, label_map,
                                make_scene, masks, place, scene_records, set_visible)

SOME = {style: [make_scene(np.random.default_rng([s, 7]), 128, style=style) for s in range(80)]
        for style in STYLES}
EVERY = [(scene, text, thing, rule) for style in STYLES for scene in SOME[style]
         for text, thing, rule in expressions(scene, RULES)]


# --- sentences

@pytest.mark.parametrize("style", STYLES)
def test_the_checker_returns_exactly_the_target(style):
    mine = [e for e in EVERY if e[0].style == style]
    assert len(mine) > 1000
    for scene, text, thing, _ in mine: assert check_expression(text, scene) == [thing], (style, text)


def test_every_rule_speaks_in_every_style():
    assert {(scene.style, rule) for scene, _, _, rule in EVERY} == {(style, rule) for style in STYLES
                                                                    for rule in RULES}


def test_no_sentence_is_written_for_two_objects_of_a_scene():
    owners = {}
    for scene, text, thing, _ in EVERY: assert owners.setdefault((id(scene), text), thing) is thing


def test_sentences_are_true_whichever_of_the_doubtful_objects_a_reader_counts():
    checked = 0
    for scene, text, thing, _ in EVERY:
        doubtful = [t for t in scene.things if not t.sure]
        for left_out in [c for n in range(1, len(doubtful) + 1) for c in combinations(doubtful, n)][:16]:
            counted = Scene(scene.side, scene.ground, [t for t in scene.things if t not in left_out])
            assert check_expression(text, counted) == [thing], text
            checked += 1
    assert checked > 1000


def test_doubtful_objects_are_never_targets_and_there_are_some():
    assert all(thing.visible >= SURE for _, _, thing, _ in EVERY)
    assert sum(t.visible < SURE for scene in SOME["aerial"] for t in scene.things) > 10


OPPOSITE = {"left": "right", "right": "left", "top": "bottom", "bottom": "top", "above": "below",
            "below": "above", "leftmost": "rightmost", "rightmost": "leftmost",
            "topmost": "bottommost", "bottommost": "topmost", "largest": "smallest", "smallest": "largest"}


def exchanged(text, words): return re.sub(rf"\b({'|'.join(words)})\b", lambda m: words[m[0]], text)


@pytest.mark.parametrize("rule", ["end", "cell", "size", "relation"])
def test_the_checker_rejects_the_opposite_word(rule):
    tried = 0
    for scene, text, thing, found_by in EVERY:
        if found_by == rule and exchanged(text, OPPOSITE) != text:
            assert thing not in check_expression(exchanged(text, OPPOSITE), scene), text
            tried += 1
    assert tried > 300


def test_the_checker_rejects_the_opposite_pick_in_combinations():
    tried = 0
    for scene, text, thing, rule in EVERY:
        word = text.split()[1]
        if rule == "combined" and word in OPPOSITE:
            assert thing not in check_expression(text.replace(word, OPPOSITE[word], 1), scene), text
            tried += 1
    assert tried > 300


def test_the_checker_rejects_a_wrong_number_in_a_row():
    tried = 0
    for scene, text, thing, rule in EVERY:
        if rule == "ordinal":
            for other in {"second", "third", "fourth"} - {text.split()[1]}:
                assert thing not in check_expression(text.replace(text.split()[1], other), scene), text
                tried += 1
    assert tried > 300


def test_the_checker_rejects_another_colour_and_another_category():
    tried = 0
    for scene, text, thing, rule in EVERY:
        noun = next(w for w in (f"{thing.colour} {thing.category}", thing.category) if w in text)
        for colour in {*COLOURS, *TONES} - {thing.colour} if noun != thing.category else ():
            assert thing not in check_expression(text.replace(noun, f"{colour} {thing.category}", 1),
                                                 scene), text
        # a storage tank is a tank
        for category in set(SHAPES) - {thing.category} - ({"tank"} if thing.category == "storage tank"
                                                          else set()):
            assert thing not in check_expression(text.replace(thing.category, category, 1), scene), text
            tried += 1
    assert tried > 10_000


def test_a_sentence_for_another_object_is_noticed():
    """What the writer's margins are for: a checker that always agreed would not see these."""
    two = Scene(100, "soil", [place("ship", "red", (20, 50), 10), place("ship", "red", (60, 20), 20),
                              place("tank", "red", (40, 80), 10)])
    a, b, tank = two.things
    assert check_expression("the red ship", two) == [a, b]
    assert (check_expression("the largest ship", two) == [b]
            and check_expression("the smallest ship", two) == [a])
    assert (check_expression("the ship left of the red tank", two) == [a]
            and check_expression("the ship above the tank", two) == [a, b])
    assert (check_expression("the ship left of the red ship", two) == []
            and check_expression("the ship left of the blue tank", two) == [])
    assert (check_expression("the tank at the bottom", two) == [tank]
            and check_expression("the tank in the centre", two) == [])
    assert (check_expression("the second ship from the left", two) == [b]
            and check_expression("the third ship from the left", two) == [])


@pytest.mark.parametrize("text", ["", "the", "ship", "the big ship", "a red ship", "the second ship",
                                  "the leftmost ship from the left", "the ship near the tank",
                                  "the ship in the top left corner", "the red", "the ship left of",
                                  "the ship left of the big tank", "the largest smallest ship",
                                  "the red  ship", "The red ship", "the red ship."])
def test_unknown_wording_is_refused(text):
    with pytest.raises(ValueError, match="cannot read"): check_expression(text, SOME["simple"][0])


def test_the_sentences_fill_the_slots_that_the_grammar_names():
    found = SENTENCE.fullmatch("the white ship left of the largest storage tank").groupdict()
    assert {k: v for k, v in found.items() if v and k != "tail"} == dict(
        colour="white", category="ship", relation="left of", anchor="the largest storage tank")
    assert {SENTENCE.fullmatch(text) is not None for _, text, _, _ in EVERY} == {True}


def test_a_doubtful_rival_silences_the_rules_that_it_could_change():
    hidden = replace(place("ship", "red", (50, 50), 30), visible=0.5)
    scene = Scene(100, "soil", [place("ship", "red", (20, 20), 12), place("ship", "blue", (80, 80), 12),
                                hidden])
    said = {text for text, _, _ in expressions(scene, RULES)}
    assert "the red ship" not in said and not any("second" in text for text in said)
    assert "the blue ship" in said and "the leftmost ship" in said
    hidden.visible = 1.0
    assert "the second ship from the left" in {text for text, _, _ in expressions(scene, RULES)}


def test_a_half_hidden_object_is_called_large_only_by_what_is_seen():
    large, small = replace(place("tank", "red", (30, 30), 20),
                           visible=0.7), place("tank", "blue", (80, 80), 15)
    scene = Scene(100, "soil", [large, small])   # areas 4 : 2.25 = 1.78 whole, 1.24 as seen
    assert describe(scene, large, "largest") == describe(scene, small, "smallest") == []
    large.visible = 0.9
    assert (describe(scene, large, "largest") == ["the largest tank"]
            and describe(scene, small, "smallest") == ["the smallest tank"])


def test_simple_scenes_keep_their_words():
    for scene in SOME["simple"]:
        for text, _, rule in expressions(scene):
            assert rule in ("name", "end", "cell", "size", "relation")
            assert not {"storage", "second", "bright", "dark"} & set(text.split())


def test_grey_scenes_have_no_colour_words():
    grey = [scene for scene in SOME["other"] if scene.grey]
    assert 20 < len(grey) < 60
    for scene in grey:
        picture = np.asarray(draw_scene(scene, np.random.default_rng(0)))
        assert (picture[..., 0] == picture[..., 1]).all() and (picture[..., 1] == picture[..., 2]).all()
        assert {t.colour for t in scene.things} <= set(TONES)


def test_bright_and_dark_can_be_seen_in_grey_scenes():
    for scene in (s for s in SOME["other"] if s.grey):
        picture, labels = np.asarray(draw_scene(scene, np.random.default_rng(0)))[..., 0], label_map(scene)
        for k, t in enumerate(scene.things, 1):
            if t.length < 10 or t.visible < SURE: continue
            inside, ground = np.median(picture[labels == k]), np.median(picture[labels == 0])
            assert ((inside > ground + 20) == (t.colour == "bright")
                    and (inside < ground - 20) == (t.colour == "dark")), (t, inside, ground)


@pytest.mark.parametrize("style", ["simple", "aerial", "other"])
def test_an_object_shows_the_colour_that_it_is_called_by(style):
    """The median pixel of its mask lies nearer to its own paint than to any other of the style."""
    for scene in (s for s in SOME[style] if not s.grey):
        palette = STYLES[style].colours
        picture, shown = np.asarray(draw_scene(scene, np.random.default_rng(0))).astype(float), masks(scene)
        for t, mask in zip(scene.things, shown):
            if t.visible < SURE or mask.sum() < 12: continue
            seen = np.median(picture[mask], 0)
            assert min(palette, key=lambda c: np.linalg.norm(seen - palette[c])) == t.colour, (
                t.category, t.colour, t.length, seen)


# --- boxes, masks, pixels

@pytest.mark.parametrize("style", STYLES)
def test_pixels_that_an_object_changes_are_those_of_its_mask(style):
    """Drawn once with and once without the object (and without shadows): all that differs lies within 1 px of
    its outline, and its mask differs."""
    STYLES["plain"] = replace(STYLES[style], shadow=0.0, sensor=0.0)
    try:
        for scene in SOME[style][:25]:
            scene = replace(scene, style="plain")
            for k, t in enumerate(scene.things):
                if t.category == "bridge": continue  # its river is ground
                without = replace(scene, things=[o for o in scene.things if o is not t])
                a, b = (np.asarray(draw_scene(s, np.random.default_rng(3))).astype(int)
                        for s in (scene, without))
                changed, mask = np.abs(a - b).max(2) > 0, masks(scene)[k]
                ys, xs = np.nonzero(changed)
                assert shapely.contains_xy(Polygon(t.outline).buffer(1), xs + 0.5, ys + 0.5).all()
                # grey paint may equal grey ground here and there
                assert (changed & mask).sum() >= 0.75 * mask.sum()
    finally: del STYLES["plain"]


@pytest.mark.parametrize("style", STYLES)
def test_masks_lie_in_their_boxes_and_boxes_in_the_picture(style):
    for scene in SOME[style]:
        for t, mask in zip(scene.things, masks(scene)):
            x1, y1, x2, y2 = t.box
            assert 0 <= x1 < x2 <= 128 and 0 <= y1 < y2 <= 128
            ys, xs = np.nonzero(mask)
            if len(xs):
                assert (x1 - 1 <= xs.min() and xs.max() + 1 <= x2 + 1 and y1 - 1 <= ys.min()
                        and ys.max() + 1 <= y2 + 1)
            if t.visible == 1 and t.length > 8: assert xs.min() <= x1 + 1.5 and xs.max() + 1 >= x2 - 1.5
            if t.visible == 1:
                assert (Polygon(t.outline).buffer(-0.6).area - 1 <= mask.sum()
                        <= Polygon(t.outline).buffer(0.6).area + 1)


def test_a_large_mask_has_the_area_of_its_outline():
    for category in SHAPES:
        thing = place(category, "red", (100, 100), 120, 0.3)
        scene = Scene(200, "soil", [thing])
        assert masks(scene).sum() == pytest.approx(Polygon(thing.outline).area, rel=0.05)
        assert thing.area == pytest.approx(Polygon(thing.outline).area)


def test_simple_pixels_of_a_colour_lie_inside_the_boxes():
    for seed in range(20):
        scene = make_scene(np.random.default_rng(seed))
        scene.things = [t for t in scene.things if t.colour == "red"]
        picture = np.asarray(draw_scene(scene, np.random.default_rng(seed))).astype(int)
        ys, xs = np.nonzero((picture[..., 0] > 170) & (picture[..., 1] < 80) & (picture[..., 2] < 80))
        for x, y in zip(xs, ys):
            assert any(t.box[0] - 1 <= x + 0.5 <= t.box[2] + 1 and t.box[1] - 1 <= y + 0.5 <= t.box[3] + 1
                       for t in scene.things)
        assert len(xs) > 0 or not scene.things


@given(st.sampled_from(list(SHAPES)), st.floats(0, 6.28), st.floats(1, 80))
def test_the_oriented_box_holds_the_outline_tightly(category, angle, length):
    thing = place(category, "red", (50, 40), length, angle)
    corners = np.array(thing.polygon).reshape(4, 2)
    box, outline = Polygon(corners), Polygon(thing.outline)
    assert box.buffer(1e-6 * length).contains(outline)
    upright = place(category, "red", (50, 40), length)
    x1, y1, x2, y2 = upright.box
    # as large as the box of the object lying along x
    assert box.area == pytest.approx((x2 - x1) * (y2 - y1))
    (a, b), (c, d) = corners[1] - corners[0], corners[2] - corners[1]
    # right angles, clockwise on the screen
    assert a * c + b * d == pytest.approx(0, abs=1e-6 * length ** 2) and a * d - b * c > 0
    nose = np.array((np.cos(angle), np.sin(angle)))
    # the first side runs towards the nose
    assert (corners[1] - corners[0]) @ nose == pytest.approx(x2 - x1)


@given(st.lists(st.tuples(*[st.integers(0, 50)] * 2, *[st.integers(1, 20)] * 2), max_size=12))
def test_kept_boxes_are_apart_and_the_others_are_not(sizes):
    boxes = np.array([(x, y, x + w, y + h) for x, y, w, h in sizes], float).reshape(-1, 4)
    kept = clear_boxes(boxes, 0)
    for i, a in enumerate(boxes):
        assert any(iou(a, boxes[k]) > 0 or touching(a, boxes[k]) for k in kept if k < i) != (i in kept)


def touching(a, b): return a[0] <= b[2] and b[0] <= a[2] and a[1] <= b[3] and b[1] <= a[3]


@pytest.mark.parametrize("style", STYLES)
def test_objects_do_not_overlap_and_stay_within_the_style(style):
    look = STYLES[style]
    for scene in SOME[style]:
        boxes = [t.box for t in scene.things]
        assert all(iou(a, b) == 0 for i, a in enumerate(boxes) for b in boxes[:i])
        assert (look.objects[0] <= len(boxes) <= look.objects[1]
                and {t.category for t in scene.things} <= set(look.categories))
        assert all(look.sizes[0] * 128 <= t.length <= look.sizes[1] * 128 for t in scene.things)


def test_aerial_scenes_are_tiny_to_large_and_sparse_to_crowded():
    lengths, counts = ([t.length / 128 for s in SOME["aerial"] for t in s.things],
                       [len(s.things) for s in SOME["aerial"]])
    assert min(lengths) < 0.03 and max(lengths) > 0.35 and min(counts) <= 3 and max(counts) >= 20
    assert {t.category for s in SOME["aerial"] for t in s.things} == set(STYLES["aerial"].categories)


def test_a_cover_takes_pixels_from_the_mask_but_not_from_the_box():
    scene = next(s for s in SOME["aerial"] if any(0.3 < t.visible < 0.9 for t in s.things))
    whole, seen = label_map(scene, covers=False), label_map(scene)
    assert ((seen == 0) | (seen == whole)).all() and (seen != whole).any()
    for k, t in enumerate(scene.things, 1):
        assert t.visible == pytest.approx((seen == k).sum() / max(1, (whole == k).sum()))


def test_more_than_255_objects_keep_their_labels():
    scene = Scene(400, "soil", [place("vehicle", "red", (10 + 20 * (k % 20), 10 + 20 * (k // 20)), 10)
                                for k in range(300)])
    set_visible(scene)
    assert label_map(scene).max() == 300 and all(t.visible == 1 for t in scene.things)


# --- records

@pytest.mark.parametrize("style", STYLES)
def test_a_record_holds_the_annotation_of_its_target(style):
    for row in scene_records(25, 5, 128, style=style):
        assert Image.open(io.BytesIO(row["image"]["bytes"])).size == (row["width"], row["height"]) == (128,
                                                                                                       128)
        mask = decode_mask(row["mask"])
        assert mask.shape == (128, 128) and mask.any() and len(row["polygon"]) == 8
        x1, y1, x2, y2 = mask_box(row["mask"])
        assert (row["box"][0] - 1 <= x1 and row["box"][1] - 1 <= y1 and x2 <= row["box"][2] + 1
                and y2 <= row["box"][3] + 1)
        assert row["category"] in row["expression"] and row["source"].split(":")[1] in STYLES[style].rules
        assert min(row["polygon"]) >= 0 and max(row["polygon"]) <= 128


@pytest.mark.parametrize("style", STYLES)
def test_the_objects_of_a_record_are_all_that_can_be_seen(style, monkeypatch):
    drawn = []
    monkeypatch.setattr("rsground_nb.scenes.draw_scene",
                        lambda scene, rng: drawn.append(scene) or Image.new("RGB", (4, 4)))
    for row in scene_records(40, 7, 96, style=style):
        shapes = masks(drawn[-1])
        assert row["objects"] == [dict(category=t.category, colour=t.colour, box=list(t.box))
                                  for t, m in zip(drawn[-1].things, shapes) if m.any()]
        assert [o["category"] for o in row["objects"] if o["box"] == row["box"]] == [row["category"]]


PRINT_DIGEST = ("import hashlib; from rsground_nb.scenes import STYLES, scene_records; "
                "print(hashlib.sha256(repr([list(scene_records(4, 9, 96, style=s)) for s in "
                "STYLES]).encode()).hexdigest())")


def test_the_same_seed_gives_the_same_bytes_in_a_fresh_process():
    here = hashlib.sha256(repr([list(scene_records(4, 9, 96, style=s)) for s in STYLES]).encode()).hexdigest()
    for hash_seed in ("1", "2"):
        done = subprocess.run([sys.executable, "-c", PRINT_DIGEST], capture_output=True, text=True,
                              env={**os.environ, "PYTHONHASHSEED": hash_seed})
        assert done.stdout.strip() == here, done.stderr


def test_seeds_splits_and_styles_differ():
    rows = [next(scene_records(1, seed, split=split, style=style))["image"]["bytes"] for seed in (0, 1)
            for split in ("train", "val", "test") for style in STYLES]
    assert len(set(rows)) == len(rows)


def test_rules_of_a_record_can_be_chosen():
    assert {row["source"] for row in scene_records(12, 0, rules=("ordinal", "size"), style="aerial")} == {
        "scenes:ordinal", "scenes:size"}


# --- limits

def test_unknown_names_are_refused_with_the_choices():
    rng = np.random.default_rng(0)
    with pytest.raises(ValueError, match="unknown style 'areal': use one of simple, aerial, other"):
        make_scene(rng, style="areal")
    with pytest.raises(ValueError, match="unknown style"): next(scene_records(1, 0, style="areal"))
    with pytest.raises(ValueError, match="unknown rule 'ends'"): next(scene_records(1, 0, rules=("ends",)))
    with pytest.raises(ValueError, match="unknown style"): draw_scene(Scene(20, "soil", [], "areal"), rng)


@pytest.mark.parametrize("fewest, most, side", [(3, 2, 112), (0, 2, 112), (1, 1, 0)])
def test_impossible_numbers_are_refused(fewest, most, side):
    with pytest.raises(ValueError, match="must be at least 1, most at least fewest"):
        make_scene(np.random.default_rng(0), side, fewest, most)


def test_too_many_objects_are_refused_not_left_out():
    with pytest.raises(ValueError, match="no room for 60"):
        make_scene(np.random.default_rng(0), fewest=60, most=60)


def test_rules_that_say_nothing_end_with_an_error():
    STYLES["lonely"] = Style(objects=(1, 1))
    try:
        with pytest.raises(ValueError, match="no expression in 1000 scenes of 20 px"):
            next(scene_records(1, 0, 20, rules=("end",), style="lonely"))
    finally: del STYLES["lonely"]


def test_no_rows_are_no_error():
    assert list(scene_records(0, 0)) == []


def test_an_empty_scene_one_object_and_two_equal_ones():
    assert (expressions(Scene(50, "soil", []), RULES) == []
            and masks(Scene(50, "soil", [])).shape == (0, 50, 50))
    one, other = (place("ship", "red", (25, 25), 10) for _ in range(2))
    assert {rule for _, _, rule in expressions(Scene(50, "soil", [one]), RULES)} == {"name", "cell"}
    twins = Scene(50, "soil", [one, other])
    assert expressions(twins, RULES) == [] and check_expression("the largest ship", twins) == [one, other]
    assert draw_scene(Scene(50, "soil", []), np.random.default_rng(0)).size == (50, 50)


@settings(max_examples=25, deadline=None)
@given(st.sampled_from(list(STYLES)), st.integers(6, 90), st.integers(0, 10_000))
def test_any_side_gives_drawable_scenes_whose_targets_have_pixels(style, side, seed):
    rng = np.random.default_rng(seed)
    scene = make_scene(rng, side, style=style)
    assert draw_scene(scene, rng).size == (side, side)
    shown = masks(scene)
    for text, thing, _ in expressions(scene, RULES):
        assert shown[scene.things.index(thing)].any()
        assert check_expression(text, scene) == [thing]


def test_things_compare_by_identity():
    a, b = (Thing("ship", "red", np.zeros((3, 2))) for _ in range(2))
    assert a != b and a in [b, a]


def test_the_vocabulary_of_the_checker_is_that_of_the_styles():
    for look in STYLES.values():
        for category in look.categories:
            for colour in {**look.colours, **TONES}:
                assert SENTENCE.fullmatch(f"the {colour} {category}")["category"] == category


# --- hops

@pytest.mark.parametrize("style", STYLES)
def test_records_can_be_asked_for_by_hops_in_turn(style):
    rows = list(scene_records(9, 3, 112, style=style, hops=(1, 2, 3)))
    assert [r["hops"] for r in rows] == [1, 2, 3] * 3 == [count_hops(r["expression"], tuple(SHAPES))
                                                          for r in rows]
    assert rows == list(scene_records(9, 3, 112, style=style, hops=(1, 2, 3)))
    assert all(r["hops"] in (1, 2) for r in scene_records(6, 3, 112))   # the rules of the style "simple"


def test_hops_that_no_rule_can_say_end_with_an_error():
    with pytest.raises(ValueError, match="no expression in 1000 scenes of 20 px, style 'simple' and 3 hops"):
        next(scene_records(1, 0, 20, rules=("name",), hops=(3,)))
