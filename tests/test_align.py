"""Properties of the aligner and of structural consistency (SCR)."""
import math

import pytest
import torch

from rsground_nb.align import (SIDES, Aligned, Aligner, add_lora, coverage, disagreement, load_clip,
                               read_texts, response_centre, response_loss, side_fault, structure,
                               structure_loss)


@pytest.fixture(scope="module")
def tiny(): return load_clip("tiny", 0)


@pytest.mark.parametrize("text, owner, edges", [
    ("the red ship", [0, 0, 0], []),
    ("the ship right of the red storage tank", [0, 0, -1, -1, 1, 1, 1, 1], [("right", 0, 1)]),
    ("the ship above the tank that is nearest to the plane", [0, 0, -1, 1, 1, 1, 1, -1, -1, 2, 2],
     [("above", 0, 1), ("near", 1, 2)]),
    ("the topmost ship left of the largest ship", [0, 0, 0, -1, -1, 1, 1, 1], [("left", 0, 1)])])
def test_the_structure_of_an_expression(text, owner, edges):
    found = structure(text)
    assert (found.owner, found.edges) == (owner, edges)


def test_every_token_of_a_word_belongs_to_its_phrase(tiny):
    _, tokenizer, _ = tiny
    texts = read_texts(tokenizer, ["the ship left of the u-shaped building"])  # several tokens for one word
    assert texts.ids.shape[1] > 9
    assert texts.owner[0].tolist()[:5] == [-1, 0, 0, -1, -1] and set(texts.owner[0, 5:-1].tolist()) == {1}


def test_the_number_of_tokens_in_the_error_is_the_texts(tiny):
    _, tokenizer, _ = tiny
    with pytest.raises(ValueError, match="reads 77 tokens, this expression has 82"):
        read_texts(tokenizer, ["the ship"] + ["ship " * 80])


def maps_at(*spots, side=8, height=12.0):
    maps = torch.zeros(len(spots), side, side)
    for k, (x, y) in enumerate(spots): maps[k, y, x] = height
    return maps


def test_disagreement_does_not_depend_on_order_or_level():
    maps = torch.randn(3, 5, 5, generator=torch.Generator().manual_seed(0))
    assert disagreement(maps).item() > 0.1
    assert disagreement(maps.flip(0)).item() == pytest.approx(disagreement(maps).item(), abs=1e-5)
    assert disagreement(maps + torch.tensor([1.0, -2, 3])[:, None, None]).item() == pytest.approx(
        disagreement(maps).item(), abs=1e-5)


def test_the_majority_of_a_phrase_wins():
    maps = maps_at((1, 1), (1, 1), (6, 5)).requires_grad_()
    disagreement(maps).backward()
    drifted = -maps.grad[2]
    assert drifted[1, 1] > 0.1 and drifted[5, 6] < -0.1
    assert maps.grad[2].abs().max() > 2 * maps.grad[0].abs().max()


@pytest.mark.parametrize("kind", SIDES)
def test_a_side_is_at_fault_only_on_the_wrong_side(kind):
    way = 0.2 * torch.tensor(SIDES[kind], dtype=torch.float32)
    here = torch.tensor([0.5, 0.5])
    assert side_fault(kind, here + way, here).item() == 0
    axes = sum(map(abs, SIDES[kind]))
    assert side_fault(kind, here - way, here).item() == pytest.approx(axes * (0.2 + 0.08), abs=1e-6)


def test_the_gradient_of_a_side_moves_the_anchor_there():
    maps = torch.zeros(2, 8, 8, requires_grad=True)
    side_fault("left", *response_centre(maps)).backward()
    assert -maps.grad[1, 0, 7] > 0 > -maps.grad[1, 0, 0]  # the anchor to the right
    assert -maps.grad[0, 0, 0] > 0 > -maps.grad[0, 0, 7]


def test_scr_is_nothing_for_responses_that_agree_and_grows_with_drift(tiny):
    _, tokenizer, _ = tiny
    texts = read_texts(tokenizer, ["the ship left of the red tank"])
    ship, tank = (1, 4), (6, 4)
    right = maps_at(ship, ship, ship, ship, ship, tank, tank, tank, ship, height=30.0)
    drift = right.clone()
    drift[7] = maps_at((1, 1), height=30.0)[0]
    mirrored = right.flip(2)
    loss = lambda maps: structure_loss(Aligned(maps[1:2], maps[None], None), texts).item()
    assert loss(right) == pytest.approx(0, abs=1e-4)
    assert loss(drift) > 1
    assert loss(mirrored) == pytest.approx(5 / 8 + 0.08, abs=1e-3)


def test_scr_of_texts_without_anything_to_compare_is_a_zero_with_a_gradient(tiny):
    _, tokenizer, _ = tiny
    texts = read_texts(tokenizer, ["left"])._replace(owner=torch.full((1, 3), -1), edges=[[]])
    maps = torch.zeros(1, 3, 4, 4, requires_grad=True)
    loss = structure_loss(Aligned(maps[:, 0], maps, None), texts)
    loss.backward()
    assert loss.item() == 0


def test_where_is_right_exactly_when_the_response_is_the_share():
    cover = coverage(torch.eye(8)[None], 4)
    best = (cover + 1e-9).log()
    other = cover.roll(1, 1)
    assert response_loss(best, cover) < response_loss((other + 1e-9).log(), cover)
    assert response_loss(torch.zeros(1, 4, 4), cover).item() > math.log(16)


def test_an_answer_does_not_depend_on_the_other_questions(tiny):
    clip, tokenizer, _ = tiny
    torch.manual_seed(0)
    model, pixels = Aligner(clip).eval(), torch.randn(2, 3, 112, 112)
    texts = ["the ship", "the tank that is nearest to the largest plane"]
    both = model(pixels, read_texts(tokenizer, texts), torch.tensor([1, 0]))
    one = model(pixels[1:], read_texts(tokenizer, texts[:1]), torch.tensor([0]))
    assert torch.allclose(both.sentence[0], one.sentence[0], atol=1e-4)


def test_lora_moves_and_the_encoders_do_not():
    clip, tokenizer, _ = load_clip("tiny", 0)
    add_lora(clip, 2)
    before = {name: weight.clone() for name, weight in clip.named_parameters()}
    model = Aligner(clip)
    moving = [p for p in model.parameters() if p.requires_grad]
    adam = torch.optim.SGD(moving, 0.1)
    texts = read_texts(tokenizer, ["the red ship"])
    for _ in range(2):  # LoRA's second matrix starts at zero
        loss = response_loss(model(torch.randn(1, 3, 112, 112), texts, torch.tensor([0])).sentence,
                             torch.eye(14)[None])
        adam.zero_grad()
        loss.backward()
        adam.step()
    changed = {name for name, weight in clip.named_parameters() if not torch.equal(weight, before[name])}
    assert changed and all("lora_" in name for name in changed)
    assert {name.split(".")[0] for name in changed} == {"text_model", "vision_model"}
