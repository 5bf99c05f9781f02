"""Sentences over random pictures: the checker reads each as exactly its object, refuses false ones, and
counts the hops that the maker meant."""
import re
from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings, strategies as st

from rsground_nb.sentences import (NUMBERS, RULES, Picture, Seen, check_expression, choose, count_hops,
                                   plural, sentences)

KINDS = ("plane", "ship", "storage tank", "large-vehicle", "ground track field")


def random_picture(seed, most=9):
    """Boxes of any size anywhere in a picture of any shape; some are doubtful, half
    of the pictures have colours."""
    rng = np.random.default_rng(seed)
    width, height, things = *rng.integers(80, 700, 2).tolist(), []
    kinds, painted = rng.choice(KINDS, rng.integers(1, 4), replace=False), rng.random() < 0.5
    for _ in range(rng.integers(1, most + 1)):
        x, y = rng.uniform(0, width), rng.uniform(0, height)
        w, h = np.exp(rng.uniform(1, 4.5, 2))
        box = (x, y, min(width, x + w), min(height, y + h))
        doubtful = rng.random() < 0.12
        things.append(Seen(str(rng.choice(kinds)), box, str(rng.choice(["red", "blue"])) if painted else None,
                           0.5 if doubtful else 1.0, not doubtful))
    return Picture(width, height, things)


PICTURES = [random_picture(s) for s in range(400)]
EVERY = [(p, text, thing, rule) for p in PICTURES for text, thing, rule in sentences(p)]
FEW = EVERY[::7]


def kinds_of(p): return tuple(sorted({t.category for t in p.things}))


def test_every_sentence_is_read_as_exactly_its_object():
    assert len(EVERY) > 5000
    for p, text, thing, rule in EVERY: assert check_expression(text, p) == [thing], (rule, text)


def test_every_rule_and_every_number_of_hops_occurs():
    assert {rule for *_, rule in EVERY} == set(RULES)
    assert set(Counter(count_hops(text, kinds_of(p)) for p, text, *_ in EVERY)) == {1, 2, 3}


HOPS = {"name": {1}, "end": {1}, "cell": {1}, "size": {1}, "ordinal": {1}, "corner": {1}, "count": {1},
        "relation": {2}, "half": {2}, "nearest": {2}, "same": {2}, "chain": {3}, "combined": {1, 2, 3}}


def test_hops_follow_from_the_rule():
    for p, text, _, rule in EVERY: assert count_hops(text, kinds_of(p)) in HOPS[rule], (rule, text)


@pytest.mark.parametrize("text, hops", [
    ("the plane", 1), ("the red ship", 1), ("the leftmost red ship", 1), ("the largest ship", 1),
    ("the ship in the top left", 1), ("the third ship from the top", 1),
    ("the ship nearest to the top left corner", 1), ("the leftmost of the three ships", 1),
    ("the red ship in the top left", 1), ("the largest ship in the top left", 2),
    ("the ship left of the red plane", 2), ("the second largest plane in the left half", 2),
    ("the ship nearest to the largest plane", 2), ("the largest ship left of the red plane", 3),
    ("the plane above the ship that is nearest to the largest plane", 3),
    ("the plane right of the largest ship in the left half", 3), ("the plane left of the largest ship", 2)])
def test_hops_by_hand(text, hops): assert count_hops(text, ("plane", "ship")) == hops


OPPOSITE = {"left": "right", "right": "left", "top": "bottom", "bottom": "top", "above": "below",
            "below": "above", "leftmost": "rightmost", "rightmost": "leftmost",
            "topmost": "bottommost", "bottommost": "topmost", "largest": "smallest", "smallest": "largest"}


@pytest.mark.parametrize("rule", ["end", "size", "relation", "same", "count"])
def test_the_opposite_word_is_refused(rule):
    tried = 0
    for p, text, thing, found_by in EVERY:
        if found_by != rule: continue
        word = next(w for w in text.split() if w in OPPOSITE or f"{w} of" in ("left of", "right of"))
        changed = re.sub(rf"\b{word}\b", OPPOSITE[word], text, count=1)
        assert thing not in check_expression(changed, p), (text, changed)
        tried += 1
    assert tried > 25


def test_a_wrong_number_is_refused():
    tried = 0
    for p, text, thing, rule in EVERY:
        if rule == "count":
            for word in set(NUMBERS) - set(text.split()):
                assert check_expression(re.sub("|".join(rf"\b{w}\b" for w in NUMBERS), word, text), p) == []
                tried += 1
    assert tried > 200


def test_planted_false_sentences_are_refused():
    """The same sentence said of the picture turned upside down and mirrored is true of its
    object only if it names no side."""
    def turned(p):
        def far(t): x1, y1, x2, y2 = t.box; return (p.width - x2, p.height - y2, p.width - x1, p.height - y1)
        return Picture(p.width, p.height,
                       [Seen(t.category, far(t), t.colour, t.visible, t.sure) for t in p.things])
    tried = wrong = 0
    for p, text, thing, rule in FEW:
        if rule not in ("end", "cell", "count", "relation", "same") or "centre" in text: continue
        after = turned(p)
        tried += 1
        wrong += after.things[p.things.index(thing)] in check_expression(text, after)
    assert tried > 300 and wrong == 0


def test_sentences_hold_whichever_of_the_doubtful_objects_a_reader_counts():
    checked = 0
    for p, text, thing, _ in EVERY:
        for left_out in [t for t in p.things if not t.sure][:3]:
            assert check_expression(text,
                                    Picture(p.width, p.height, [t for t in p.things if t is not left_out],
                                            categories=kinds_of(p))) == [thing], text
            checked += 1
    assert checked > 1000


def test_a_doubtful_object_is_never_meant():
    assert all(thing.sure for *_, thing, _ in EVERY)


@settings(max_examples=60, deadline=None)
@given(st.integers(1000, 10 ** 6), st.sampled_from([1, 2, 3, None]))
def test_choose_says_something_true_of_the_hops_asked_for(seed, hops):
    p = random_picture(seed, 14)
    found = choose(p, np.random.default_rng(seed), hops=hops)
    if found:
        text, thing, rule = found
        assert check_expression(text, p) == [thing] and (text, thing, rule) in sentences(p, [rule])
        assert hops in (None, count_hops(text, kinds_of(p)))


# --- by hand

def spot(category, x, y, size=10, **more):
    return Seen(category, (x - size / 2, y - size / 2, x + size / 2, y + size / 2), **more)


def said(p, rule): return {text: thing for text, thing, _ in sentences(p, [rule])}


def test_a_picture_need_not_be_square():
    p = Picture(600, 100, [spot("plane", 150, 20), spot("plane", 180, 80)])
    assert "the leftmost plane" not in said(p, "end")   # 30 px of 600
    assert set(said(p, "end")) == {"the topmost plane", "the bottommost plane"}
    assert "the plane on the right" in said(Picture(600, 100,
                                                    [spot("plane", 550, 50), spot("plane", 50, 50)]), "cell")


def test_a_turned_plane_is_not_called_larger():
    # 2.25 in area: more than turning by 45 degrees can do
    straight, turned = Seen("plane", (0, 0, 40, 40)), Seen("plane", (100, 0, 160, 60))
    assert set(said(Picture(300, 300, [straight, turned]), "size")) == {"the largest plane",
                                                                        "the smallest plane"}
    assert said(Picture(300, 300, [straight, Seen("plane", (100, 0, 158, 58))]), "size") == {}   # 2.1
    # the same ship, turned: area 1000 and 6084
    long, diagonal = Seen("ship", (0, 0, 100, 10)), Seen("ship", (100, 100, 178, 178))
    assert said(Picture(300, 300, [long, diagonal]), "size") == {}


def test_a_category_may_hold_another():
    """A storage tank may be called a tank."""
    p = Picture(100, 100, [spot("tank", 20, 20), spot("storage tank", 80, 80)])
    assert "the tank" not in said(p, "name") and "the storage tank" in said(p, "name")
    assert check_expression("the tank", p) == p.things
    assert said(p, "count") == {}


def test_the_second_largest_of_all_must_not_be_another_one_in_that_half():
    here = [spot("plane", 20, 20, 8), spot("plane", 20, 50, 16), spot("plane", 20, 80, 32)]
    # the largest of all, elsewhere: the second largest of all is the largest on the left
    far = spot("plane", 80, 50, 64)
    assert "the second largest plane in the left half" not in said(Picture(100, 100, [*here, far]), "half")
    assert said(Picture(100, 100, [*here, spot("plane", 80, 50, 6)]),
                "half")["the second largest plane in the left half"] is here[1]


def test_a_last_part_that_could_belong_to_either_noun():
    """'the plane right of the largest ship in the left half': in whose left half? The checker reads both."""
    ships = [spot("ship", 10, 20, 12), spot("ship", 12, 60, 30), spot("ship", 80, 80, 60)]
    left, right = spot("plane", 45, 60, 5), spot("plane", 90, 60, 5)
    text = "the plane right of the largest ship in the left half"
    assert check_expression(text, Picture(100, 100, [*ships, right])) == [right]
    assert check_expression(text, Picture(100, 100, [ships[0], ships[1], left, right])) == [left, right]
    assert text in said(Picture(100, 100, [*ships, right]), "chain")


def test_an_anchor_is_no_candidate():
    p = Picture(100, 100, [spot("plane", 20, 50), spot("plane", 45, 50), spot("plane", 90, 50)])
    assert said(p, "nearest")["the plane nearest to the leftmost plane"] is p.things[1]
    assert check_expression("the plane nearest to the leftmost plane", p) == [p.things[1]]


def test_no_object_is_found_by_way_of_itself():
    for p, text, thing, rule in EVERY:
        if rule == "chain" and "that is nearest to " in text:
            anchor = text.rpartition("that is nearest to ")[2]
            assert check_expression(anchor, p) != [thing], text


@pytest.mark.parametrize("word, several", [("ship", "ships"), ("storage tank", "storage tanks"),
                                           ("bus", "buses"), ("ferry", "ferries"), ("church", "churches"),
                                           ("large-vehicle", "large-vehicles"), ("highway", "highways")])
def test_plurals(word, several): assert plural(word) == several


@pytest.mark.parametrize("text", ["the second largest ship from the left", "the ship in the middle half",
                                  "the ship nearest to the corner", "the leftmost of the ships",
                                  "the leftmost of three ships",
                                  "the ship that is nearest to", "the two ships",
                                  "the ship nearest to the top corner", "the leftmost of the three tanks"])
def test_unknown_wording_is_refused(text):
    with pytest.raises(ValueError, match="cannot read"):
        check_expression(text, Picture(10, 10, [spot("ship", 5, 5, 2)]))


def test_categories_are_read_whatever_letters_they_hold():
    odd = Picture(100, 100, [spot("C++ (type 2) plane", 20, 20), spot("C++ (type 2) plane", 80, 80),
                             spot("*", 50, 50)])
    found = sentences(odd)
    assert len(found) > 10
    for text, thing, _ in found: assert check_expression(text, odd) == [thing]


def test_nothing_is_said_of_an_empty_picture():
    assert (sentences(Picture(10, 10, [])) == []
            and choose(Picture(10, 10, []), np.random.default_rng(0)) is None)
