import re

import numpy as np
from shapely import Polygon

from rsground_nb.scenes import RELATIONS, draw_scene, expressions, make_scene


def holds(text, thing, scene):
    """Does the sentence hold for this thing? A second reading of the words, without the margins of the writer."""
    words = text.split()
    if words[1] in ("leftmost", "rightmost", "topmost", "bottommost"):
        axis, sign = {"leftmost": (0, -1), "rightmost": (0, 1), "topmost": (1, -1), "bottommost": (1, 1)}[words[1]]
        return thing.category == words[2] and sign * thing.centre[axis] >= max(sign * t.centre[axis] for t in scene.things if t.category == words[2])
    if words[1] in ("largest", "smallest"):
        best = (max if words[1] == "largest" else min)((t for t in scene.things if t.category == words[2]), key=lambda t: Polygon(t.outline).area)
        return thing is best
    for relation, (axis, sign) in RELATIONS.items():
        if f" {relation} the " in text:
            colour, category = text.split(f" {relation} the ")[1].split()
            anchor = next(t for t in scene.things if (t.colour, t.category) == (colour, category))
            return thing.category == words[1] and sign * (thing.centre[axis] - anchor.centre[axis]) > 0
    place = re.search(r" (?:in|on|at) the ([a-z ]+)$", text)
    if place:
        column, row = (int(3 * c / scene.side) for c in thing.centre)
        here = {"left": column == 0, "right": column == 2, "top": row == 0, "bottom": row == 2, "centre": (column, row) == (1, 1)}
        return thing.category == words[1] and all(here[word] for word in place.group(1).split())
    return (thing.colour, thing.category) == (words[1], words[2])


def test_every_sentence_is_true_for_its_object_and_for_no_other():
    checked = 0
    for seed in range(300):
        scene = make_scene(np.random.default_rng(seed))
        for text, target, _ in expressions(scene):
            assert [t for t in scene.things if holds(text, t, scene)] == [target], (seed, text)
            checked += 1
    assert checked > 1000


def test_pixels_of_a_colour_lie_inside_the_boxes():
    for seed in range(20):
        scene = make_scene(np.random.default_rng(seed))
        scene.things = [t for t in scene.things if t.colour == "red"]
        picture = np.asarray(draw_scene(scene, np.random.default_rng(seed))).astype(int)
        ys, xs = np.nonzero((picture[..., 0] > 170) & (picture[..., 1] < 80) & (picture[..., 2] < 80))
        for x, y in zip(xs, ys):
            assert any(t.box[0] - 1 <= x + 0.5 <= t.box[2] + 1 and t.box[1] - 1 <= y + 0.5 <= t.box[3] + 1 for t in scene.things)
        assert len(xs) > 0 or not scene.things
