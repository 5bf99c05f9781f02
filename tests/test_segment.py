"""The functions of chapter 12, on the shipped segmenter."""
import numpy as np
import pytest

from rsground_nb.drawing import draw_scene
from rsground_nb.masks import load_segmenter
from rsground_nb.scenes import Scene, masks, place
from rsground_nb.segment import filled, ground, mask_explorer, mask_iou, mask_rewards, masks_for, prompted

SCENE = Scene(112, "grass", [place("tank", "red", (30, 30), 30), place("ship", "blue", (80, 80), 40)])
PICTURE = draw_scene(SCENE, np.random.default_rng(0))


@pytest.fixture(scope="module")
def model(): return load_segmenter("tiny-segment")


def test_a_filled_box_holds_the_pixels_whose_centres_are_inside():
    assert filled((1, 0, 3, 2), 4, 3).tolist() == [[False, True, True, False]] * 2 + [[False] * 4]
    assert not filled((1.6, 1.6, 2.4, 2.4), 4, 4).any()
    assert filled((-9, -9, 99, 99), 4, 3).all()


def test_places_are_in_pixels_of_the_picture(model):
    own, wide = ground(model, PICTURE, "the ship"), ground(model, PICTURE.resize((224, 112)), "the ship")
    assert wide.mask.shape == (112, 224) and own.mask.shape == (112, 112)
    assert np.allclose(wide.points[0], own.points[0] * (2, 1), atol=4)
    assert np.allclose(wide.box, own.box * (2, 1, 2, 1), atol=6)
    assert masks(SCENE)[1][tuple(own.points[0].astype(int)[::-1])]


def test_an_expression_without_words_is_refused(model):
    with pytest.raises(ValueError, match="has no words"): ground(model, PICTURE, " ")


def test_each_box_gets_its_own_mask_and_none_gets_an_empty_one(model):
    boxes = [None, SCENE.things[1].box, (5, 5, 5, 9), SCENE.things[0].box, (200, 5, 300, 9)]
    found = masks_for(model, [PICTURE] * 5, boxes)
    assert [bool(mask.any()) for mask in found] == [False, True, False, True, False]
    tank, ship = masks(SCENE)
    assert mask_iou(found[1], ship) > 0.5 > mask_iou(found[1], tank)
    assert mask_iou(found[3], tank) > 0.5 > mask_iou(found[3], ship)
    assert masks_for(model, [PICTURE], [None])[0].shape == (112, 112)


def test_a_box_over_the_edge_is_cut(model):
    whole, cut = masks_for(model, [PICTURE] * 2, [(-50, -50, 45, 45), (0, 0, 45, 45)])
    assert (whole == cut).all()


def test_rewards_are_those_of_the_own_box(model):
    tank = masks(SCENE)[0]
    right, none, other = mask_rewards(model, PICTURE, [SCENE.things[0].box, None, SCENE.things[1].box], tank)
    assert right > 0.5 and none == 0 and other < 0.2


def test_a_click_or_a_drag_changes_the_picture(model):
    pointer = mask_explorer(model, PICTURE, SCENE.things[0].box)
    (x1, y1, x2, y2), pictures = (v / 112 for v in SCENE.things[1].box), [pointer.picture]
    middle = [(x1 + x2) / 2, (y1 + y2) / 2]
    for drawn in ([x1, y1, x2, y2], middle * 2):
        pointer.drawn = drawn
        pictures.append(pointer.picture)
    assert len(set(pictures)) == 3


def test_a_point_marks_the_object_under_it(model):
    for thing, true in zip(SCENE.things, masks(SCENE)):
        x1, y1, x2, y2 = thing.box
        assert mask_iou(prompted(model, PICTURE, [(x1 + x2) / 2, (y1 + y2) / 2]), true) > 0.5
        assert mask_iou(prompted(model, PICTURE, thing.box), true) > 0.5


@pytest.mark.parametrize("drawn, message", [((130, 5), "point .130, 5. lies outside"), ((5, -1), "outside"),
                                            ((90, 5, 130, 20), "no area inside the canvas")])
def test_a_prompt_outside_the_picture_is_refused(model, drawn, message):
    with pytest.raises(ValueError, match=message): prompted(model, PICTURE, drawn)
