"""Properties of prompts made from responses."""
import pytest
import torch

from rsground_nb.align import Aligned
from rsground_nb.prompts import box_prompts, local_peak, make_prompts, moment_box, peaks


def block(x, y, width, height, cells=14, logit=30.0):
    maps = torch.full((1, cells, cells), -logit)
    maps[0, y:y + height, x:x + width] = logit
    return maps


@pytest.mark.parametrize("x, y, width, height", [(2, 3, 1, 1), (5, 5, 3, 2), (9, 1, 2, 4), (0, 0, 2, 2)])
def test_the_box_of_a_filled_block_is_the_block(x, y, width, height):
    centre = torch.tensor([[x + width / 2, y + height / 2]])
    found = moment_box(block(x, y, width, height), centre)[0].tolist()
    assert found == pytest.approx([x, y, x + width, y + height], abs=1e-3)


def test_a_second_object_does_not_move_point_or_box():
    one, both = block(2, 2, 2, 2), block(2, 2, 2, 2)
    both[0, 10:12, 10:12] = 29.0
    point = local_peak(both)
    assert torch.allclose(point, local_peak(one), atol=1e-3)
    assert moment_box(both, point)[0].tolist() == pytest.approx(moment_box(one, point)[0].tolist(), abs=1e-3)


def test_peaks_come_in_order_and_apart():
    maps = torch.full((1, 14, 14), -5.0)
    for x, y, height in ((3, 3, 9.0), (4, 3, 8.5), (10, 4, 5.0), (6, 11, 7.0)): maps[0, y, x] = height
    points, heights = peaks(maps, 3)
    assert heights[0].tolist() == [9, 7, 5]
    assert points[0, 1].tolist() == pytest.approx([6.5, 11.5], abs=0.01)


@pytest.mark.parametrize("canvas, embedding", [(112, 14), (1024, 64)])
def test_prompts_are_in_pixels_of_the_canvas(canvas, embedding):
    ship, tank = block(2, 3, 3, 2), block(9, 9, 2, 2)
    aligned = Aligned(ship, torch.stack([ship[0], tank[0]])[None], None)
    found = make_prompts(aligned, torch.ones(1, 2), canvas, embedding)
    cell = canvas / 14
    assert found.boxes[0].tolist() == pytest.approx([2 * cell, 3 * cell, 5 * cell, 5 * cell], rel=1e-3)
    assert found.dense.shape == (1, 1, 4 * embedding, 4 * embedding)
    x, y = (found.points[0, 1] / cell).tolist()
    assert 9 <= x <= 11 and 9 <= y <= 11 and found.labels.tolist() == [[1, 0]]


def test_padding_makes_no_negative_point():
    ship, tank = block(2, 3, 3, 2), block(9, 9, 2, 2)
    aligned = Aligned(ship, torch.stack([ship[0], tank[0]])[None], None)
    found = make_prompts(aligned, torch.tensor([[1, 0]]), 112, 14)
    assert found.labels.tolist() == [[1, -10]]


@pytest.mark.parametrize("box", [(-1.0, 0, 5, 5), (3, 3, 3, 9), (9, 3, 4, 9), (0, 0, 5, 113),
                                 (float("nan"), 0, 5, 5)])
def test_a_box_that_is_none_is_refused(box):
    with pytest.raises(ValueError, match="has no area inside the canvas of 112 px"):
        box_prompts(torch.tensor([box]), 112)
