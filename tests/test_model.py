import json
import subprocess
import sys
import tarfile
import zipfile

import pytest
import torch
from peft import get_peft_model
from PIL import Image
from transformers import AutoModelForImageTextToText, DynamicCache, Qwen2_5_VLConfig, Qwen2VLConfig

from conftest import ROOT
from rsground_nb.data import load_folder
from rsground_nb.loading import SHIPPED, TEMPLATES, GroundingProcessor
from rsground_nb.memory import kept_bytes, memory_plan, plan_for
from rsground_nb.model import (CODEC_OF, adapt, codec_of, fingerprints, generate_answers, load_tiny, load_vlm,
                               make_tiny, save_tiny, student_codec)


def test_model_and_processor_come_back(tmp_path):
    model, processor = make_tiny(0)
    save_tiny(model, processor, tmp_path)
    loaded, again = load_vlm(str(tmp_path))
    assert (type(again) is GroundingProcessor and again.tokenizer.get_vocab()
            == processor.tokenizer.get_vocab() and again.chat_template == processor.chat_template)
    assert again.image_processor.to_dict() == processor.image_processor.to_dict()
    for name, weight in model.state_dict().items():
        assert torch.equal(weight.half().float(), loaded.state_dict()[name])


def test_image_tokens_match_the_codec_for_every_real_size(shared):
    _, processor = load_tiny()
    codec = codec_of("qwen2_5_vl", processor)  # the convention in which the size of the copy matters
    rows = load_folder(shared / "aerial_mini")[0]["test"]
    for row in rows:
        height, width = (16 * int(n) for n in processor.image_processor([row["image"]], return_tensors="pt")
                         .image_grid_thw[0, 1:])
        assert codec.frame(row["width"], row["height"]) == (width, height)


def test_an_unknown_model_class_is_refused(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "bert"}))
    with pytest.raises(ValueError, match="is a bert model: this package supports"): load_vlm(str(tmp_path))


def small_folder(kind, folder):
    """A model of the class `kind` with random weights and all that belongs to it, as a user would have it on
    disk; the tokenizer is ours."""
    model, processor = make_tiny(0)
    if kind != "qwen3_vl":
        text = model.config.text_config.to_dict()
        shared = {k: text[k] for k in ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers",
                                       "num_attention_heads", "num_key_value_heads", "bos_token_id",
                                       "eos_token_id", "pad_token_id", "max_position_embeddings")}
        ids = {k: getattr(model.config, k) for k in ("image_token_id", "video_token_id",
                                                     "vision_start_token_id", "vision_end_token_id")}
        rope = {"rope_parameters": {"rope_type": "default", "rope_theta": 10000.0,
                                    "mrope_section": [4, 6, 6]}}
        tower = dict(depth=2, num_heads=4, patch_size=16, spatial_merge_size=1, temporal_patch_size=1)
        if kind == "qwen2_5_vl":
            config = Qwen2_5_VLConfig(text_config=shared | rope, vision_config=tower
                                      | dict(hidden_size=128, intermediate_size=256, out_hidden_size=128,
                                             fullatt_block_indexes=[1]), tie_word_embeddings=True, **ids)
        else:
            config = Qwen2VLConfig(text_config=shared | rope,
                                   vision_config=tower | dict(embed_dim=128, hidden_size=128, mlp_ratio=2),
                                   tie_word_embeddings=True, **ids)
        model = AutoModelForImageTextToText.from_config(config)
    save_tiny(model, processor, folder)
    return folder


@pytest.mark.parametrize("kind", CODEC_OF)
def test_every_class_loads_answers_and_learns_with_lora(kind, tmp_path):
    folder = str(small_folder(kind, tmp_path))
    model, processor = load_vlm(folder, attn_implementation="eager")
    assert (model.config.model_type == kind and processor.chat_template == TEMPLATES[kind]
            and model.config._attn_implementation == "eager")
    assert student_codec(folder) == codec_of(kind, processor) and student_codec(folder).name == CODEC_OF[kind]
    picture = Image.new("RGB", (120, 90), "green")
    assert len(generate_answers(model, processor, [picture] * 2, ["the ship", "the red tank"],
                                max_new_tokens=4)) == 2
    adapted = get_peft_model(model, adapt(model, 4))
    adapted.enable_input_require_grads()
    adapted.gradient_checkpointing_enable()
    before = fingerprints(adapted)
    text = processor.apply_chat_template([{"role": "user", "content": [
        {"type": "image"}, {"type": "text", "text": "Locate the ship."}]}], tokenize=False)
    batch = processor(text=[text], images=[[picture]], return_tensors="pt")
    adapted.train()
    adapted(**batch, labels=batch["input_ids"]).loss.backward()
    without = [n for n, p in adapted.named_parameters() if p.requires_grad and "lora_B" in n
               and (p.grad is None or not p.grad.any())]
    assert not without and not [n for n, p in adapted.named_parameters() if "visual" in n
                                and (p.requires_grad or p.grad is not None)]
    torch.optim.AdamW([p for p in adapted.parameters() if p.requires_grad], 1e-3).step()
    after = fingerprints(adapted)
    assert before["frozen"] == after["frozen"] and before["trained"] != after["trained"]


def test_the_plan_needs_no_weights(tmp_path):
    folder = small_folder("qwen3_vl", tmp_path)
    (folder / "model.safetensors").unlink()
    with pytest.raises(OSError): load_vlm(str(folder))
    two, four = (plan_for(str(folder), num_generations=n) for n in (2, 4))
    assert four["keys and values"] == 2 * two["keys and values"] > 0


def test_the_plan_counts_what_a_small_model_really_needs():
    """Parts that can be known exactly are exact; what autograd keeps is within a fifth (embeddings and the
    last norm are not in the plan)."""
    model, processor = load_tiny()
    plan = memory_plan(model.config, rank=8, num_generations=3, rows_per_pass=3, width=112, height=112,
                       max_pixels=112 * 112, prompt_tokens=20, completion_tokens=20, dtype=torch.float32,
                       checkpointing=False) * 2 ** 30
    assert plan["weights"] == sum(p.nbytes for p in model.parameters())
    adapted = get_peft_model(model, adapt(model, 8))
    moving = sum(p.nbytes for p in adapted.parameters() if p.requires_grad)
    assert plan["LoRA weights"] == plan["gradients"] == moving == plan["Adam"] / 2
    ids = torch.full((3, 49 + 40), 5)
    ids[:, 3], ids[:, 4:53] = model.config.vision_start_token_id, model.config.image_token_id
    inputs = dict(input_ids=ids, attention_mask=torch.ones_like(ids),
                  mm_token_type_ids=(ids == model.config.image_token_id).int(),
                  pixel_values=torch.zeros(3 * 49, 768), image_grid_thw=torch.tensor([[1, 7, 7]] * 3))
    body = adapted.get_base_model().model
    assert kept_bytes(lambda: body(**inputs, use_cache=False).last_hidden_state,
                      adapted) == pytest.approx(plan["activations"], rel=0.2)
    cache = DynamicCache(config=model.config.text_config)
    with torch.no_grad(): body(**inputs, past_key_values=cache, use_cache=True)
    assert plan["keys and values"] == sum(part.nbytes for layer in cache.layers
                                          for part in (layer.keys, layer.values))


OFFLINE = """
import socket, sys
def refuse(*a, **k): raise AssertionError("no network, please")
socket.socket.connect = socket.create_connection = socket.getaddrinfo = refuse
sys.path.insert(0, sys.argv[1])
import rsground_nb.model, time
assert rsground_nb.model.__file__.startswith(sys.argv[1]), rsground_nb.model.__file__
began = time.time()
model, processor = rsground_nb.model.load_tiny("grpo")
print("loaded in", time.time() - began)
from PIL import Image
picture = Image.new("RGB", (112, 112), "green")
print(rsground_nb.model.generate_answers(model, processor, [picture], ["the red ship"], max_new_tokens=24))
"""


def test_the_wheel_and_the_source_archive_hold_the_model_and_load_it_offline(tmp_path):
    subprocess.run([sys.executable, "setup.py", "-q", "egg_info", "--egg-base", str(tmp_path), "sdist", "-d",
                    str(tmp_path)], cwd=ROOT, check=True, capture_output=True)
    [archive] = tmp_path.glob("*.tar.gz")
    wanted = {str(p.relative_to(ROOT)) for folder in (*SHIPPED.values(), "tiny_segment")
              for p in (ROOT / "rsground_nb" / "assets" / folder).iterdir()}
    with tarfile.open(archive) as opened: opened.extractall(tmp_path / "source", filter="data")
    [source] = (tmp_path / "source").iterdir()
    assert all((source / name).exists() for name in wanted)
    # of the archive: whoever has only that can build
    subprocess.run([sys.executable, "setup.py", "-q", "bdist_wheel", "-d", str(tmp_path)], cwd=source,
                   check=True, capture_output=True)
    [wheel] = tmp_path.glob("*.whl")
    with zipfile.ZipFile(wheel) as opened:
        assert wanted <= set(opened.namelist())
        opened.extractall(tmp_path / "unpacked")
    done = subprocess.run([sys.executable, "-c", OFFLINE, str(tmp_path / "unpacked")], cwd=tmp_path,
                          capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    print(done.stdout)
