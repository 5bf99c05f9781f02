"""The segmenter: what its training moves, what stays, and that it continues where it stopped."""
from dataclasses import replace

import numpy as np
import pytest
import torch

from conftest import ROOT
from rsground_nb.align import read_texts
from rsground_nb.folders import to_dataset
from rsground_nb.masks import load_segmenter, make_segmenter, mask_loss, predict_masks
from rsground_nb.scenes import scene_records
from rsground_nb.segment import mask_iou, masks_for
from rsground_nb.segmentation import (SMOKE, Questions, drawn, ground_step, segment_rows, train_segmenter,
                                      trained_in)
from rsground_nb.shapes import decode_mask


@pytest.fixture(scope="module")
def rows(): return segment_rows(4, 0, per_scene=3)


def weights(part): return torch.cat([p.detach().flatten().clone() for p in part.parameters()])


def test_each_stage_moves_its_parts_only(rows, tmp_path):
    model = make_segmenter()
    parts = dict(aligner=model.aligner, cues=model.cues, encoder=model.sam.vision_encoder,
                 decoder=model.sam.mask_decoder)
    names = {id(p): name for name, part in parts.items() for p in part.parameters()}
    moved = {stage: {names.get(id(p), "prompts") for p in trained_in(model, stage)} for stage in
             ("align", "sam", "ground")}
    assert moved["align"] == {"aligner"}
    assert moved["sam"] == {"encoder", "decoder", "prompts"}
    assert moved["ground"] == {"aligner", "cues", "decoder", "prompts"}


def test_a_trained_model_differs_in_every_part(rows, tmp_path):
    fresh, trained = make_segmenter(), train_segmenter(rows, SMOKE, 0, tmp_path)
    for name in ("aligner", "cues", "sam"): assert not torch.equal(weights(getattr(fresh, name)),
                                                                   weights(getattr(trained, name))), name


def test_an_interrupted_training_ends_like_an_uninterrupted_one(rows, tmp_path, monkeypatch):
    import rsground_nb.segmentation as segmentation
    whole = train_segmenter(rows, SMOKE, 0, tmp_path / "whole")
    real = segmentation.ground_step
    def stops(*given):
        if stops.left == 0: raise KeyboardInterrupt
        stops.left -= 1
        return real(*given)
    stops.left = 2
    monkeypatch.setitem(segmentation.STAGES, "ground", (stops, 3))
    with pytest.raises(KeyboardInterrupt): train_segmenter(rows, SMOKE, 0, tmp_path / "cut", save_every=1)
    assert not (tmp_path / "cut" / "model.safetensors").exists()
    stops.left = 99
    again = train_segmenter(rows, SMOKE, 0, tmp_path / "cut", save_every=1)
    assert stops.left == 99 - (SMOKE.ground_steps - 2)
    assert torch.allclose(weights(again), weights(whole), atol=1e-5)


def test_a_loss_that_is_not_finite_stops_the_training(rows, tmp_path, monkeypatch):
    import rsground_nb.segmentation as segmentation
    broken = lambda model, *given: model.cues[0].weight.sum() * float("nan")
    monkeypatch.setitem(segmentation.STAGES, "align", (broken, 1))
    with pytest.raises(FloatingPointError, match="align, step 1"): train_segmenter(rows, SMOKE, 0, tmp_path)


def test_frozen_encoders_stay_frozen_and_lora_moves(rows):
    model = make_segmenter(lora_rank=2)
    encoder = {name for name, p in model.sam.vision_encoder.named_parameters() if p.requires_grad}
    assert encoder and all("lora_" in name for name in encoder)


def test_a_prediction_is_the_same_in_any_company(rows):
    model, images, texts = make_segmenter(seed=3), rows["image"][:3], rows["expression"][:3]
    together = predict_masks(model, images, texts)
    for image, text, mask in zip(images, texts, together):
        assert (predict_masks(model, [image], [text])[0] != mask).mean() < 0.001


def test_all_rows_of_a_picture_are_drawn_together(rows):
    questions = Questions(rows)
    chosen, images = questions.draw(np.random.default_rng(0), 8, 9)
    for group in chosen: assert len({rows["image_id"][k] for k in group}) == 1
    assert max(map(len, chosen)) > 1


def test_a_few_steps_overfit_one_picture(rows):
    torch.manual_seed(0)
    model, one = make_segmenter(), Questions(rows)
    group = one.groups[0]
    views, texts = model.views([one.images[group[0]]["image"]]), read_texts(model.tools.tokenizer,
                                                                             [one.texts[k] for k in group])
    targets, picture = one.targets(group, 112), torch.zeros(len(group), dtype=int)
    adam, losses = torch.optim.AdamW(model.parameters(), 2e-3), []
    for _ in range(25):
        loss = mask_loss(model(views, texts, picture).masks, targets)
        adam.zero_grad()
        loss.backward()
        adam.step()
        losses.append(loss.item())
    assert min(losses) < 0.5 * losses[0]


def test_another_setting_does_not_take_a_finished_folder(rows, tmp_path):
    train_segmenter(rows, SMOKE, 0, tmp_path)
    with pytest.raises(ValueError, match="holds another run"):
        train_segmenter(rows, replace(SMOKE, structure=0.0), 0, tmp_path)
    assert load_segmenter(tmp_path).use == ("sparse", "dense", "cues")


def test_neighbouring_places_have_similar_codes():
    code = make_segmenter().sam.get_image_wide_positional_embeddings()[0].detach()
    def alike(a, b): return torch.cosine_similarity(a, b, 0).mean().item()
    assert alike(code[:, :, 1:], code[:, :, :-1]) > 0.4 > abs(alike(code[:, :, :7], code[:, :, 7:]))


def test_only_questions_without_a_rough_mask_train_the_code_for_none(rows):
    model, questions = make_segmenter(), Questions(rows)
    none = model.sam.prompt_encoder.no_mask_embed.weight
    for alone, moves in ((0.0, False), (1.0, True)):
        size, rng = replace(SMOKE, alone=alone), np.random.default_rng(0)
        model.zero_grad()
        ground_step(model, size, *drawn(model, questions, size, rng), rng).backward()
        assert (none.grad is not None and bool(none.grad.any())) == moves


def test_the_shipped_segmenter_reads_words_and_boxes():
    model, rows = load_segmenter("tiny-segment"), to_dataset(list(scene_records(48, 5, split="test")))
    def score(made): return np.mean([mask_iou(a, decode_mask(b)) for a, b in zip(made, rows["mask"])])
    images, boxes = rows["image"][:], rows["box"][:]
    asked = score(predict_masks(model, images, rows["expression"][:]))
    others = score(predict_masks(model, images, rows["expression"][1:] + rows["expression"][:1]))
    assert asked > 0.5 > others
    turned = boxes[1:] + boxes[:1]
    assert score(masks_for(model, images, boxes)) > 0.5 > score(masks_for(model, images, turned))


def test_the_weights_are_small_and_have_a_card():
    folder = ROOT / "rsground_nb" / "assets" / "tiny_segment"
    assert (folder / "model.safetensors").stat().st_size < 6e6
    card = (folder / "README.md").read_text(encoding="utf-8")
    for word in ("Data", "Time", "Command", "Measured", "Licence", "Limits"): assert f"**{word}**" in card
