"""Shared prompts against the usual way: the same tokens, log-probabilities, gradients, steps."""
import os
import subprocess
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import torch
import trl.trainer.grpo_trainer as trl_grpo
from peft import get_peft_model
from transformers import (GenerationConfig, Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration,
                          Qwen3VLForConditionalGeneration, Qwen3VLMoeConfig,
                          Qwen3VLMoeForConditionalGeneration)
from trl import GRPOTrainer
from trl.trainer.utils import add_fused_lm_head

import rsground_nb.rollouts
import rsground_nb.train
from rsground_nb.data import load_data
from rsground_nb.model import REASON, codec_of, load_tiny, load_vlm, lora_config, to_prompt
from rsground_nb.rewards import text_of
from rsground_nb.rollouts import (accept_encoded, by_group, by_rollout, draw_tokens, encode_images,
                                  per_rollout, score_rollouts, share_attention, write_rollouts)
from rsground_nb.scale import get_scale, start
from rsground_nb.train import grpo_rows, grpo_trainer

SMALL = replace(get_scale("smoke"), num_train=16, num_val=2, num_test=8, grpo_steps=3,
                grpo_learning_rate=5e-4, prompts_per_step=4, num_generations=4, max_completion_length=24,
                rows_per_pass=8, lora_rank=0)
G = 3


def tiny(kind):
    """The shipped model, alone or with LoRA that is not zero; a random Qwen2.5-VL with two queries per key; a
    random Qwen3-VL whose tower merges 2 x 2 patches and hands over three depths."""
    start(0)
    model, processor = load_tiny()
    if kind == "lora":
        model.requires_grad_(False)
        model = get_peft_model(model, lora_config(8))
        for name, weight in model.named_parameters():
            if "lora_B" in name: torch.nn.init.normal_(weight, std=0.05)
    if kind == "qwen2_5_vl":
        was = model.config
        text = dict(was.text_config.to_dict(), num_key_value_heads=2,
                    rope_parameters={"rope_type": "default", "rope_theta": 10000.0,
                                     "mrope_section": [6, 5, 5]}, model_type="qwen2_5_vl_text",
                    initializer_range=0.2)
        vision = dict(depth=1, hidden_size=64, intermediate_size=64, num_heads=2, patch_size=16,
                      spatial_merge_size=1, temporal_patch_size=1, out_hidden_size=128,
                      fullatt_block_indexes=[0], window_size=112)
        ids = {name: getattr(was, name) for name in ("image_token_id", "video_token_id",
                                                     "vision_start_token_id", "vision_end_token_id")}
        model = Qwen2_5_VLForConditionalGeneration(Qwen2_5_VLConfig(text_config=text, vision_config=vision,
                                                                    tie_word_embeddings=True, **ids)).eval()
        model.generation_config = GenerationConfig(pad_token_id=processor.tokenizer.pad_token_id)
    if kind == "deep":
        model.config.vision_config.update(dict(spatial_merge_size=2, deepstack_visual_indexes=[0, 1]))
        processor.image_processor.merge_size = 2
        generation, model = model.generation_config, Qwen3VLForConditionalGeneration(model.config).eval()
        model.generation_config = generation
    return model, processor


def questions(processor, copies):
    """Prompts of different length, images of different size, each `copies` times."""
    rows = load_data("scenes", SMALL, 0)[0]["test"].select(range(4))
    images = [image.resize(size) for image, size in zip(rows["image"],
                                                        ((112, 112), (112, 80), (64, 96), (112, 112)))]
    texts = [processor.apply_chat_template(to_prompt(e, REASON + " Go." * k), add_generation_prompt=True,
                                           tokenize=False) for k, e in enumerate(rows["expression"])]
    return processor(text=[t for t in texts for _ in range(copies)],
                     images=[[i] for i in images for _ in range(copies)], padding=True, return_tensors="pt")


def lists(batch):
    """What write_rollouts and score_rollouts take."""
    cut = lambda rows: [row[mask.bool()] for row, mask in zip(rows, batch.attention_mask)]
    return cut(batch.input_ids), G, cut(batch.mm_token_type_ids), batch.pixel_values, batch.image_grid_thw


def generated(model, batch, **kwargs):
    made = model.generate(**batch, max_new_tokens=40,
                          **(dict(top_k=0, top_p=1.0) if kwargs["do_sample"] else {}),
                          **kwargs)[:, batch["input_ids"].shape[1]:]
    ends = torch.isin(made, torch.tensor(kwargs["eos_token_id"]))
    return [row[:int(end.int().argmax()) + 1 if end.any() else None] for row, end in zip(made, ends)]


@pytest.mark.parametrize("kind", ["tiny", "lora", "qwen2_5_vl", "deep"])
def test_same_tokens_as_generate(kind):
    model, processor = tiny(kind)
    many, once = questions(processor, G), lists(questions(processor, 1))
    blocked = processor.tokenizer.convert_tokens_to_ids(["<|image_pad|>", "<|video_pad|>"])
    start(1)
    free = generated(model, many, do_sample=True, eos_token_id=[0], suppress_tokens=blocked, temperature=0.7)
    # tokens that are sometimes written end a rollout here, so that lengths differ
    ends = torch.cat(free).bincount().topk(20).indices[10:].tolist()
    greedy = generated(model, many, do_sample=False, eos_token_id=ends, suppress_tokens=blocked)
    start(2)
    sampled = generated(model, many, do_sample=True, eos_token_id=ends, suppress_tokens=blocked,
                        temperature=0.7)
    share_attention(model)
    how = dict(max_new_tokens=40, eos=ends, suppress=blocked, temperature=0.7)
    write = partial(write_rollouts, model, *once, **how)
    assert all(map(torch.equal, write(do_sample=False), greedy))
    # the random numbers of generate
    start(2); drawn = write(draw=lambda chances: torch.multinomial(chances, 1)[:, 0], least_live=0)
    assert all(map(torch.equal, drawn, sampled)) and len({len(row) for row in drawn}) > 3
    start(2); assert len(set(map(len, write()))) > 3
    accept_encoded(model)
    encoded = encode_images(model, *once[-2:])
    assert encoded.shape[:2] == (len(once[-2]), 3 if kind == "deep" else 1)
    assert all(map(torch.equal, write_rollouts(model, *once[:3], encoded, once[-1], **how, do_sample=False),
                   greedy))
    # the usual way still works, and takes encoded images, too
    for images in (many, per_rollout(dict(pixel_values=encoded, image_grid_thw=once[-1]), [[0]] * 4, G)):
        assert all(map(torch.equal, generated(model, {**many, **images}, do_sample=False, eos_token_id=ends,
                                              suppress_tokens=blocked), greedy))


@pytest.mark.parametrize("kind", ["tiny", "lora", "qwen2_5_vl", "deep"])
@pytest.mark.parametrize("dtype, close, close_gradient",
                         [(torch.float32, 1e-5, 1e-4), (torch.float64, 1e-10, 1e-6)])
def test_same_scores_and_gradients(kind, dtype, close, close_gradient):
    model, processor = tiny(kind)
    add_fused_lm_head(model.get_base_model() if kind == "lora" else model, temperature=0.7,
                      outputs=("log_probs", "entropy"))
    model.to(dtype)
    many, once = questions(processor, G), lists(questions(processor, 1))
    generator = torch.Generator().manual_seed(0)
    rollouts = [torch.randint(10, 300, (n,), generator=generator)
                for n in (5, 9, 1, 7, 0, 3, 20, 2, 2, 4, 11, 6)]
    longest, ends = 20, torch.tensor([len(r) for r in rollouts])
    padded, mask = torch.nn.utils.rnn.pad_sequence(rollouts,
                                                   batch_first=True), (torch.arange(longest) < ends[:, None])
    whole = dict(input_ids=torch.cat([many.input_ids, padded], 1),
                 attention_mask=torch.cat([many.attention_mask, mask.long()], 1),
                 mm_token_type_ids=torch.cat([many.mm_token_type_ids, torch.zeros_like(padded)], 1))
    labels = whole["input_ids"].masked_fill(whole["attention_mask"] == 0,
                                            -100).index_fill(1, torch.arange(many.input_ids.shape[1]), -100)
    def gradients(scores):
        model.zero_grad()
        logps, entropies = (s * mask for s in scores)
        (logps * torch.linspace(-1, 1, len(logps), dtype=dtype)[:, None]).sum().backward()
        return (logps.detach(), entropies.detach(),
                {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None})
    found = model(**whole, pixel_values=many.pixel_values, image_grid_thw=many.image_grid_thw, labels=labels,
                  fused_lm_head=True)
    usual = gradients((found.log_probs[:, -longest:], found.entropy[:, -longest:]))
    share_attention(model)
    prompts, size, *rest = once
    ours = gradients(score_rollouts(model, prompts, rollouts, size, *rest))
    # random tokens: log-probabilities down to -25
    for a, b in zip(usual[:2], ours[:2]): torch.testing.assert_close(a, b, atol=close, rtol=close / 10)
    assert usual[2].keys() == ours[2].keys() and len(ours[2]) > 20
    far = {name: ((usual[2][name] - ours[2][name]).norm() / (usual[2][name].norm() + 1e-4)).item()
           for name in ours[2]}
    assert max(far.values()) < close_gradient, max(far.items(), key=lambda pair: pair[1])
    accept_encoded(model)
    *scores, language = gradients(score_rollouts(model, prompts, rollouts, size, *rest[:-2],
                                                 encode_images(model, *rest[-2:]), rest[-1]))
    assert all(map(torch.equal, scores, ours[:2])) and all(g.equal(ours[2][name])
                                                           for name, g in language.items())
    # nothing flows into the tower
    assert language.keys() == {name for name in ours[2] if ".visual." not in name}


def test_draw_tokens_follows_the_chances():
    start(0)
    chances = torch.tensor([0.0, 0.2, 0.0, 0.5, 0.3, 0.0])
    shares = draw_tokens(chances.expand(20000, -1)).bincount(minlength=6) / 20000
    assert (shares[chances == 0] == 0).all() and (shares - chances).abs().max() < 0.02


def test_by_group_and_back():
    batch = dict(prompt_ids=torch.arange(2).repeat_interleave(3)[:, None],
                 completion_ids=torch.arange(12).view(6, 2), advantages=torch.arange(6.0),
                 num_items_in_batch=torch.tensor(4), num_images=[1] * 6, image_grid_thw=torch.ones(2, 3))
    grouped = by_group(batch, 3)
    assert (grouped["prompt_ids"].shape == (2, 1) and grouped["completion_ids"].shape == (2, 3, 2)
            and grouped["num_images"] == [1, 1])
    assert all(torch.as_tensor(v).equal(torch.as_tensor(batch[k])) for k, v in by_rollout(grouped).items())


def grpo(share, folder, monkeypatch, size=SMALL, prepare=lambda trainer: None, **kwargs):
    """A training run in which both ways draw the same random numbers; returns its log (with the numbers of
    images that went through processor and tower) and its weights."""
    def shuffled(batch, shuffle=trl_grpo.__dict__.get("_kept", trl_grpo.shuffle_sequence_dict)):
        state = torch.get_rng_state(); batch = shuffle(batch); torch.set_rng_state(state)
        return batch
    with monkeypatch.context() as patch:
        patch.setattr(trl_grpo, "shuffle_sequence_dict", shuffled)
        patch.setattr(rsground_nb.rollouts, "write_rollouts",
                      partial(write_rollouts, draw=lambda chances: torch.multinomial(chances, 1)[:, 0],
                              least_live=0))
        start(0)
        model, processor = load_vlm("tiny")
        trainer = grpo_trainer(model, processor, grpo_rows(load_data("scenes", size, 0)[0]["train"]),
                               codec_of(model.config.model_type, processor), size, 0, folder,
                               disable_tqdm=True, share_prompt=share, temperature=1.5, optim="sgd",
                               learning_rate=0.02, **kwargs)
        # the base does not answer in form; lengths differ
        trainer.reward_funcs[1] = lambda completions, **columns: [len(text_of(c)) / 1000 for c in completions]
        prepare(trainer)
        seen, process = dict(processed=0, encoded=0), type(processor.image_processor).preprocess
        def count(name, number): seen[name] += number
        model.model.visual.register_forward_pre_hook(
            lambda module, given, named: count("encoded", len(named["grid_thw"])), with_kwargs=True)
        patch.setattr(type(processor.image_processor), "preprocess",
                      lambda self, images, *given, **named: (count("processed", len(images)),
                                                             process(self, images, *given, **named))[1])
        trainer.train()
    log = pd.DataFrame(trainer.state.log_history)
    log = log[log.reward.notna()][[c for c in log
                                   if not c.startswith(("train_", "step_time", "epoch", "total_flos"))]]
    log.attrs = seen
    return log, {n: p.detach().clone() for n, p in trainer.model.named_parameters() if p.requires_grad}


@pytest.mark.parametrize("settings", [dict(), dict(passes=2), dict(num_iterations=2),
                                      dict(passes=2, loss_type="dapo"), dict(gradient_checkpointing=True),
                                      dict(beta=0.04, consistency=False, mask_truncated_completions=True),
                                      dict(lora=8)], ids=str)
def test_same_training_run(settings, tmp_path, monkeypatch):
    size = replace(SMALL, lora_rank=settings.get("lora", 0), rows_per_pass=16 // settings.get("passes", 1))
    settings = {name: value for name, value in settings.items() if name not in ("lora", "passes")}
    (usual, before), (ours, after) = (grpo(share, tmp_path / str(share), monkeypatch, size, **settings)
                                      for share in (False, True))
    assert len(usual) > 1 and usual.grad_norm.gt(0).all() and usual["completions/mean_length"].nunique() > 1
    # a mean over tokens of a pass, then over passes: depends on which rollouts meet in one
    if size.rows_per_pass < 16: usual, ours = (log.drop(columns="entropy") for log in (usual, ours))
    np.testing.assert_allclose(ours.to_numpy(float), usual.to_numpy(float), rtol=2e-4, atol=1e-5)
    assert (max((before[n] - after[n]).abs().max().item() for n in before) < 1e-5
            and before.keys() == after.keys())


def test_each_part_alone_is_the_same_training_run(tmp_path, monkeypatch):
    runs = {share: grpo(share, tmp_path / str(share),
                        monkeypatch, replace(SMALL, rows_per_pass=8, grpo_steps=2))
            for share in (False, ("image",), ("prefill",), ("loss",), True)}
    usual, before = runs[False]
    for ours, after in runs.values():
        np.testing.assert_allclose(ours.drop(columns="entropy").to_numpy(float),
                                   usual.drop(columns="entropy").to_numpy(float), rtol=2e-4, atol=1e-5)
        assert (max((before[n] - after[n]).abs().max().item() for n in before) < 1e-5
                and before.keys() == after.keys())
    # 2 steps of 4 questions with 4 rollouts, 2 passes each: an image is processed to write and to score,
    # encoded to write and in a pass
    assert {share: (log.attrs["processed"], log.attrs["encoded"]) for share, (log, _) in runs.items()} == {
        False: (64, 64), ("image",): (8, 8), ("prefill",): (16, 8 + 32), ("loss",): (16, 32 + 8),
        True: (8, 8)}


def test_a_moving_tower_is_not_kept(tmp_path, monkeypatch):
    def thaw(trainer): trainer.model.model.visual.merger.requires_grad_(True)
    (usual, before), (ours, after) = (grpo(share, tmp_path / str(share),
                                           monkeypatch, replace(SMALL, rows_per_pass=16, grpo_steps=2), thaw)
                                      for share in (False, True))
    moved = [name for name in before if "visual" in name]
    assert len(moved) > 3 and any(not before[n].equal(p)
                                  for n, p in load_tiny()[0].named_parameters() if n in moved)
    assert max((before[n] - after[n]).abs().max().item() for n in before) < 1e-5
    assert (ours.attrs["processed"], ours.attrs["encoded"]) == (8, 16) and usual.attrs["encoded"] == 64


def test_engine_writes_and_we_score(tmp_path, monkeypatch):
    """A stand-in for vLLM writes the rollouts: the loss is still shared."""
    def engine(trainer):
        words = [list(range(20, 25 + k % 7)) for k in range(16)]
        trainer.use_vllm, trainer._last_loaded_step = True, -1
        trainer.vllm_generation = SimpleNamespace(
            sync_weights=lambda: None, generate=lambda prompts, images, num_generations, profiler: (
                None, words, [[[-2.0]] * len(w) for w in words], None))
    (usual, before), (ours, after) = (grpo(share, tmp_path / str(share), monkeypatch,
                                           replace(SMALL, rows_per_pass=16, grpo_steps=2), engine)
                                      for share in (False, True))
    assert usual.grad_norm.gt(0).all() and (ours.attrs["processed"], ours.attrs["encoded"]) == (8, 8)
    np.testing.assert_allclose(ours.to_numpy(float), usual.to_numpy(float), rtol=2e-4, atol=1e-5)
    assert max((before[n] - after[n]).abs().max().item() for n in before) < 1e-5


def test_switched_off_it_is_trl_to_the_bit(tmp_path, monkeypatch):
    log, weights = grpo(False, tmp_path / "a", monkeypatch, consistency=False)
    monkeypatch.setattr(rsground_nb.train, "SpatialGRPOTrainer", GRPOTrainer)
    same_log, same = grpo(False, tmp_path / "b", monkeypatch, consistency=False)
    pd.testing.assert_frame_equal(log, same_log)
    assert all(weights[n].equal(same[n]) for n in same)


def test_same_training_run_on_two_processes(tmp_path):
    subprocess.run([sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "--rdzv-backend",
                    "c10d", "--rdzv-endpoint", "localhost:0", __file__, str(tmp_path)], check=True,
                   timeout=300)
    (usual, a), (ours, b), (other, c) = (torch.load(tmp_path / f"{name}.pt", weights_only=False)
                                         for name in ("False0", "True0", "True1"))
    np.testing.assert_allclose(ours, usual, rtol=2e-4, atol=1e-5)
    assert (all(torch.allclose(a[n], b[n], atol=1e-5) and b[n].equal(c[n]) for n in a)
            and any(not a[n].equal(p) for n, p in load_tiny()[0].named_parameters() if n in a))


@pytest.fixture(scope="module")
def little_rows():
    return grpo_rows(load_data("scenes", SMALL, 0)[0]["train"])


def trainer_with(rows, folder, model=None, processor=None, **settings):
    if model is None: model, processor = load_vlm("tiny")
    codec = codec_of("qwen3_vl", processor)
    return grpo_trainer(model, processor, rows, codec, SMALL, 0, folder, disable_tqdm=True, **settings)


@pytest.mark.parametrize("settings, reason", [
    (dict(per_device_train_batch_size=6, gradient_accumulation_steps=2), "whole groups"),
    (dict(top_p=0.9), "top_p"), (dict(top_k=20), "top_k"), (dict(min_p=0.1), "min_p"),
    (dict(repetition_penalty=1.1), "repetition_penalty"),
    (dict(share_prompt=["images"]), "use True, False or some of")])
def test_refused(settings, reason, tmp_path, little_rows):
    with pytest.raises(ValueError, match=reason): trainer_with(little_rows, tmp_path, **settings)
    model, _ = load_vlm("tiny")
    model.set_attn_implementation("eager")
    with pytest.raises(ValueError, match="eager"): share_attention(model)


ODD = dict(epsilon_cutoff=3e-4, eta_cutoff=3e-4, sequence_bias=[[[5], 2.0]],
           exponential_decay_length_penalty=(5, 1.1), top_h=0.4, max_time=1.0, num_beams=2, typical_p=0.9,
           no_repeat_ngram_size=2, min_new_tokens=3, min_length=3, bad_words_ids=[[5]],
           begin_suppress_tokens=[5], forced_bos_token_id=5, forced_eos_token_id=5, stop_strings="x",
           guidance_scale=1.5, remove_invalid_values=True, token_healing=True,
           watermarking_config=dict(bias=2.0), num_return_sequences=2, prompt_lookup_num_tokens=3,
           cache_implementation="static", eos_token_id=[5],
           penalty_alpha=0.6, max_new_tokens=None, temperature=0.0, mirostat_tau=5.0, top_a=0.2)


@pytest.fixture(scope="module")
def rules_of(tmp_path_factory, little_rows):
    """What generation_rules says to generation_kwargs and a model's own generation_config."""
    trainer = trainer_with(little_rows, tmp_path_factory.mktemp("rules"))
    def rules(given, of_model=()):
        before = trainer.generation_config, trainer.model.generation_config
        trainer.generation_config = GenerationConfig(**{**trainer.generation_kwargs, **given})
        trainer.model.generation_config = GenerationConfig(**dict(of_model))
        try: return rsground_nb.rollouts.generation_rules(trainer)
        finally: trainer.generation_config, trainer.model.generation_config = before
    return rules


@pytest.mark.parametrize("name", ODD)
def test_a_setting_that_is_not_honoured_is_refused_by_name(name, rules_of):
    with pytest.raises(ValueError, match=rf"{{.*'{name}'.*share_prompt=\('image', 'loss'\)"):
        rules_of({name: ODD[name]})


@pytest.mark.parametrize("name", ["epsilon_cutoff", "sequence_bias", "max_time", "no_repeat_ngram_size"])
def test_a_setting_of_the_model_itself_is_refused_too(name, rules_of):
    with pytest.raises(ValueError, match=f"{{'{name}'"): rules_of({}, {name: ODD[name]})


def test_what_is_honoured_or_neutral_passes(rules_of):
    chosen = dict(max_new_tokens=7, suppress_tokens=[3], temperature=0.5, do_sample=False)
    assert rules_of(chosen) == chosen
    assert rules_of(dict(temperature=None), dict(temperature=0.3))["temperature"] == 0.3  # as in generate
    with pytest.raises(ValueError, match="'top_k': 50"): rules_of(dict(top_k=None))  # generate's default
    rules_of(dict(top_p=1.0, top_k=0, min_p=0.0, typical_p=1.0, num_beams=1, min_new_tokens=0, use_cache=True,
                  no_repeat_ngram_size=0, epsilon_cutoff=0.0, renormalize_logits=True,
                  remove_invalid_values=False))
    qwen = dict(do_sample=True, top_k=1, top_p=0.001, temperature=0.1, repetition_penalty=1.05,
                bos_token_id=1, pad_token_id=1, eos_token_id=[1, 2])
    rules_of({}, qwen)  # what the real models bring; TRL says otherwise


def test_a_trainer_refuses_when_it_is_made(tmp_path, little_rows):
    asked = dict(top_h=0.4, mirostat=2)
    with pytest.raises(ValueError, match="'top_h': 0.4, 'mirostat': 2"):
        trainer_with(little_rows, tmp_path, generation_kwargs=asked)
    trainer_with(little_rows, tmp_path, generation_kwargs=asked, share_prompt=("image", "loss"))


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_logits_that_are_not_finite_raise_as_in_generate(bad):
    model, processor = tiny("tiny")
    many, once = questions(processor, G), lists(questions(processor, 1))
    with torch.no_grad(): model.model.language_model.norm.weight[0] = bad
    with pytest.raises(RuntimeError, match="nan"): generated(model, many, do_sample=True, eos_token_id=[0])
    share_attention(model)
    with pytest.raises(RuntimeError, match="hold nan or inf or sum to 0"):
        write_rollouts(model, *once, max_new_tokens=4)


@pytest.mark.parametrize("plain", [True, False])
def test_prompts_without_a_picture(plain, tmp_path, monkeypatch):
    """Plain text, and a conversation of text."""
    def ask(rows):
        text = lambda row: row["prompt"][0]["content"][1]["text"]
        prompt = text if plain else lambda row: [{"role": "user", "content": text(row)}]
        return [dict(prompt=prompt(row), box=row["box"], width=row["width"], height=row["height"])
                for row in rows]
    def without_pictures(trainer): trainer.data_collator = ask
    size = replace(SMALL, rows_per_pass=16, grpo_steps=2)
    (usual, before), (ours, after) = (grpo(share, tmp_path / str(share), monkeypatch, size, without_pictures)
                                      for share in (False, True))
    assert usual.attrs["encoded"] == ours.attrs["encoded"] == 0 and usual.grad_norm.gt(0).all()
    np.testing.assert_allclose(ours.to_numpy(float), usual.to_numpy(float), rtol=2e-4, atol=1e-5)
    assert max((before[n] - after[n]).abs().max().item() for n in before) < 1e-5


def experts(processor, was):
    """A random Qwen3-VL with a mixture of four experts, in the sizes of the configuration given."""
    text = dict(was.text_config.to_dict(), model_type="qwen3_vl_moe_text", moe_intermediate_size=64,
                num_experts=4, num_experts_per_tok=2, router_aux_loss_coef=0.01, decoder_sparse_step=1,
                mlp_only_layers=[])
    vision = dict(was.vision_config.to_dict(), model_type="qwen3_vl_moe_vision")
    names = ("image_token_id", "video_token_id", "vision_start_token_id", "vision_end_token_id")
    ids = {name: getattr(was, name) for name in names}
    model = Qwen3VLMoeForConditionalGeneration(Qwen3VLMoeConfig(text_config=text, vision_config=vision,
                                                                **ids))
    model.generation_config = GenerationConfig(pad_token_id=processor.tokenizer.pad_token_id)
    return model


def test_load_balancing_loss_of_experts_is_refused_in_a_shared_loss(tmp_path, little_rows):
    tiny_model, processor = load_vlm("tiny")
    def make(**how):
        return trainer_with(little_rows, tmp_path, experts(processor, tiny_model.config), processor, **how)
    advice = r"load-balancing.*router_aux_loss_coef=0 or set share_prompt=\('image', 'prefill'\)"
    with pytest.raises(ValueError, match=advice): make()
    assert not make(router_aux_loss_coef=0.0).aux_loss_enabled
    kept = make(share_prompt=("image", "prefill"), max_steps=1, check_gradients=False)
    kept.train()
    assert any("aux_loss" in row for row in kept.state.log_history)


def test_lora_dropout_shares_one_mask_over_a_prompt():
    model, processor = tiny("tiny")
    config = lora_config(8)
    config.lora_dropout = 0.5
    model = get_peft_model(model.requires_grad_(False), config).train()
    add_fused_lm_head(model.get_base_model(), outputs=("log_probs", "entropy"))
    share_attention(model)
    prompts, _, types, *pictures = lists(questions(processor, 1))
    seen = []
    mask = model.get_base_model().model.language_model.layers[0].self_attn.q_proj.lora_dropout["default"]
    mask.register_forward_hook(lambda module, given, found: seen.append((found == 0).float().mean(-1)))
    score_rollouts(model, prompts, [torch.tensor([20, 21, 22])] * 4 * G, G, types, *pictures)
    (zeros,) = seen
    assert zeros.shape == (1, sum(len(p) - 1 for p in prompts) + 4 * G * 3)  # a prompt's tokens once
    assert 0.4 < zeros.mean() < 0.6


if __name__ == "__main__":  # one of two processes
    out = Path(sys.argv[1])
    for share in (False, True):
        log, weights = grpo(share, out / str(share), pytest.MonkeyPatch(), gradient_accumulation_steps=1)
        torch.save((log.to_numpy(float) if len(log) else None, weights),
                   out / f"{share}{os.environ['RANK']}.pt")
