import json

import pytest
import torch
from transformers import AutoProcessor

from rsground_nb.data import load_folder
from rsground_nb.model import GroundingProcessor, codec_of, load_vlm, make_tiny, save_tiny


def test_the_processor_comes_back_through_autoprocessor(tmp_path):
    model, processor = make_tiny(0)
    save_tiny(model, processor, tmp_path)
    again = AutoProcessor.from_pretrained(tmp_path)
    assert type(again) is GroundingProcessor
    assert again.tokenizer.get_vocab() == processor.tokenizer.get_vocab()
    loaded, _ = load_vlm(str(tmp_path))
    for name, weight in model.state_dict().items(): assert torch.equal(weight.half().float(), loaded.state_dict()[name])


def test_image_tokens_match_the_codec_for_every_real_size(shared):
    _, processor = load_vlm("tiny")
    codec = codec_of("qwen2_5_vl", processor)
    rows = load_folder(shared / "aerial_mini")[0]["test"]
    for row in rows:
        height, width = (28 * int(n) for n in processor.image_processor([row["image"]], return_tensors="pt").image_grid_thw[0, 1:])
        assert codec.frame(row["width"], row["height"]) == (width, height)


def test_an_unknown_model_class_is_refused(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "bert"}))
    with pytest.raises(ValueError, match="is a bert model: this book knows"): load_vlm(str(tmp_path))
