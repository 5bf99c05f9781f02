"""Shared prompts against the usual way: the same tokens, log-probabilities, gradients, steps."""
import os
import subprocess
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
import trl.trainer.grpo_trainer as trl_grpo
from peft import get_peft_model
from transformers import GenerationConfig, Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration
from trl import GRPOTrainer
from trl.trainer.utils import add_fused_lm_head

import rsground_nb.rollouts
import rsground_nb.train
from rsground_nb.data import load_data
from rsground_nb.model import REASON, codec_of, load_tiny, load_vlm, lora_config, to_prompt
from rsground_nb.rollouts import SharedPrompts, by_group, by_rollout, draw_tokens, score_rollouts, share_attention, write_rollouts
from rsground_nb.scale import get_scale, start
from rsground_nb.train import grpo_rows, grpo_trainer

SMALL = replace(get_scale("smoke"), num_train=16, num_val=2, num_test=8, grpo_steps=3, prompts_per_step=4, num_generations=4, max_completion_length=24, rows_per_pass=8, lora_rank=0)
G = 3


def tiny(kind):
    """The shipped model, alone or with LoRA that is not zero, or a random Qwen2.5-VL with two queries per key."""
    start(0)
    model, processor = load_tiny()
    if kind == "lora":
        model.requires_grad_(False)
        model = get_peft_model(model, lora_config(8))
        for name, weight in model.named_parameters():
            if "lora_B" in name: torch.nn.init.normal_(weight, std=0.05)
    if kind == "qwen2_5_vl":
        was = model.config
        text = dict(was.text_config.to_dict(), num_key_value_heads=2, rope_parameters={"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [6, 5, 5]}, model_type="qwen2_5_vl_text", initializer_range=0.2)
        vision = dict(depth=1, hidden_size=64, intermediate_size=64, num_heads=2, patch_size=16, spatial_merge_size=1, temporal_patch_size=1, out_hidden_size=128, fullatt_block_indexes=[0], window_size=112)
        ids = {name: getattr(was, name) for name in ("image_token_id", "video_token_id", "vision_start_token_id", "vision_end_token_id")}
        model = Qwen2_5_VLForConditionalGeneration(Qwen2_5_VLConfig(text_config=text, vision_config=vision, tie_word_embeddings=True, **ids)).eval()
        model.generation_config = GenerationConfig(pad_token_id=processor.tokenizer.pad_token_id)
    return model, processor


def questions(processor, copies):
    """Prompts of different length, images of different size, each `copies` times."""
    rows = load_data("scenes", SMALL, 0)[0]["test"].select(range(4))
    images = [image.resize(size) for image, size in zip(rows["image"], ((112, 112), (112, 80), (64, 96), (112, 112)))]
    texts = [processor.apply_chat_template(to_prompt(e, REASON + " Go." * k), add_generation_prompt=True, tokenize=False) for k, e in enumerate(rows["expression"])]
    return processor(text=[t for t in texts for _ in range(copies)], images=[[i] for i in images for _ in range(copies)], padding=True, return_tensors="pt")


def lists(batch):
    """What write_rollouts and score_rollouts take."""
    cut = lambda rows: [row[mask.bool()] for row, mask in zip(rows, batch.attention_mask)]
    return cut(batch.input_ids), G, cut(batch.mm_token_type_ids), batch.pixel_values, batch.image_grid_thw


def generated(model, batch, **kwargs):
    made = model.generate(**batch, max_new_tokens=40, **(dict(top_k=0, top_p=1.0) if kwargs["do_sample"] else {}), **kwargs)[:, batch.input_ids.shape[1]:]
    ends = torch.isin(made, torch.tensor(kwargs["eos_token_id"]))
    return [row[:int(end.int().argmax()) + 1 if end.any() else None] for row, end in zip(made, ends)]


@pytest.mark.parametrize("kind", ["tiny", "lora", "qwen2_5_vl"])
def test_same_tokens_as_generate(kind):
    model, processor = tiny(kind)
    many, once = questions(processor, G), lists(questions(processor, 1))
    blocked = processor.tokenizer.convert_tokens_to_ids(["<|image_pad|>", "<|video_pad|>"])
    start(1); free = generated(model, many, do_sample=True, eos_token_id=[0], suppress_tokens=blocked, temperature=0.7)
    ends = torch.cat(free).bincount().topk(20).indices[10:].tolist()  # tokens that are sometimes written end a rollout here, so that lengths differ
    greedy = generated(model, many, do_sample=False, eos_token_id=ends, suppress_tokens=blocked)
    start(2); sampled = generated(model, many, do_sample=True, eos_token_id=ends, suppress_tokens=blocked, temperature=0.7)
    share_attention(model)
    write = partial(write_rollouts, model, *once, max_new_tokens=40, eos=ends, suppress=blocked, temperature=0.7)
    assert all(map(torch.equal, write(do_sample=False), greedy))
    start(2); drawn = write(draw=lambda chances: torch.multinomial(chances, 1)[:, 0], least_live=0)  # the random numbers of generate
    assert all(map(torch.equal, drawn, sampled)) and len({len(row) for row in drawn}) > 3
    start(2); assert len(set(map(len, write()))) > 3
    assert all(map(torch.equal, generated(model, many, do_sample=False, eos_token_id=ends, suppress_tokens=blocked), greedy))  # the usual way still works


@pytest.mark.parametrize("kind", ["tiny", "lora", "qwen2_5_vl"])
@pytest.mark.parametrize("dtype, close, close_gradient", [(torch.float32, 3e-5, 1e-4), (torch.float64, 1e-10, 1e-6)])
def test_same_scores_and_gradients(kind, dtype, close, close_gradient):
    model, processor = tiny(kind)
    add_fused_lm_head(model.get_base_model() if kind == "lora" else model, temperature=0.7, outputs=("log_probs", "entropy"))
    model.to(dtype)
    many, once = questions(processor, G), lists(questions(processor, 1))
    generator = torch.Generator().manual_seed(0)
    rollouts = [torch.randint(10, 300, (n,), generator=generator) for n in (5, 9, 1, 7, 0, 3, 20, 2, 2, 4, 11, 6)]
    longest, ends = 20, torch.tensor([len(r) for r in rollouts])
    padded, mask = torch.nn.utils.rnn.pad_sequence(rollouts, batch_first=True), (torch.arange(longest) < ends[:, None])
    whole = dict(input_ids=torch.cat([many.input_ids, padded], 1), attention_mask=torch.cat([many.attention_mask, mask.long()], 1), mm_token_type_ids=torch.cat([many.mm_token_type_ids, torch.zeros_like(padded)], 1))
    labels = whole["input_ids"].masked_fill(whole["attention_mask"] == 0, -100).index_fill(1, torch.arange(many.input_ids.shape[1]), -100)
    def gradients(scores):
        model.zero_grad()
        logps, entropies = (s * mask for s in scores)
        (logps * torch.linspace(-1, 1, len(logps), dtype=dtype)[:, None]).sum().backward()
        return logps.detach(), entropies.detach(), {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    found = model(**whole, pixel_values=many.pixel_values, image_grid_thw=many.image_grid_thw, labels=labels, fused_lm_head=True)
    usual = gradients((found.log_probs[:, -longest:], found.entropy[:, -longest:]))
    share_attention(model)
    prompts, size, *rest = once
    ours = gradients(score_rollouts(model, prompts, rollouts, size, *rest))
    for a, b in zip(usual[:2], ours[:2]): torch.testing.assert_close(a, b, atol=close, rtol=0)
    assert usual[2].keys() == ours[2].keys() and len(ours[2]) > 20
    far = {name: ((usual[2][name] - ours[2][name]).norm() / (usual[2][name].norm() + 1e-4)).item() for name in ours[2]}
    assert max(far.values()) < close_gradient, max(far.items(), key=lambda pair: pair[1])


def test_draw_tokens_follows_the_chances():
    start(0)
    chances = torch.tensor([0.0, 0.2, 0.0, 0.5, 0.3, 0.0])
    shares = draw_tokens(chances.expand(20000, -1)).bincount(minlength=6) / 20000
    assert (shares[chances == 0] == 0).all() and (shares - chances).abs().max() < 0.02


def test_by_group_and_back():
    batch = dict(prompt_ids=torch.arange(2).repeat_interleave(3)[:, None], completion_ids=torch.arange(12).view(6, 2), advantages=torch.arange(6.0), num_items_in_batch=torch.tensor(4), num_images=[1] * 6, image_grid_thw=torch.ones(2, 3))
    grouped = by_group(batch, 3)
    assert grouped["prompt_ids"].shape == (2, 1) and grouped["completion_ids"].shape == (2, 3, 2) and grouped["num_images"] == [1, 1]
    assert all(torch.as_tensor(v).equal(torch.as_tensor(batch[k])) for k, v in by_rollout(grouped).items())


def grpo(share, folder, monkeypatch, size=SMALL, **kwargs):
    """A training run in which both ways draw the same random numbers; returns its log, weights and the rollouts' rewards."""
    def shuffled(batch, shuffle=trl_grpo.__dict__.get("_kept", trl_grpo.shuffle_sequence_dict)):
        state = torch.get_rng_state(); batch = shuffle(batch); torch.set_rng_state(state)
        return batch
    with monkeypatch.context() as patch:
        patch.setattr(trl_grpo, "shuffle_sequence_dict", shuffled)
        patch.setattr(rsground_nb.rollouts, "write_rollouts", partial(write_rollouts, draw=lambda chances: torch.multinomial(chances, 1)[:, 0], least_live=0))
        start(0)
        model, processor = load_vlm("tiny")
        trainer = grpo_trainer(model, processor, grpo_rows(load_data("scenes", size, 0)[0]["train"]), codec_of(model.config.model_type, processor), size, 0, folder, disable_tqdm=True, share_prompt=share, temperature=1.5, optim="sgd", learning_rate=0.02, **kwargs)
        trainer.reward_funcs[1] = lambda completions, **columns: [len(c[0]["content"]) / 1000 for c in completions]  # the base does not answer in form; lengths differ
        trainer.train()
    log = pd.DataFrame(trainer.state.log_history)
    log = log[log.reward.notna()][[c for c in log if not c.startswith(("train_", "step_time", "epoch", "total_flos"))]]
    return log, {n: p.detach().clone() for n, p in trainer.model.named_parameters() if p.requires_grad}


@pytest.mark.parametrize("settings", [dict(), dict(passes=2), dict(num_iterations=2), dict(passes=2, loss_type="dapo"), dict(gradient_checkpointing=True), dict(beta=0.04, consistency=False, mask_truncated_completions=True), dict(lora=8)], ids=str)
def test_same_training_run(settings, tmp_path, monkeypatch):
    size = replace(SMALL, lora_rank=settings.get("lora", 0), rows_per_pass=16 // settings.get("passes", 1))
    settings = {name: value for name, value in settings.items() if name not in ("lora", "passes")}
    (usual, before), (ours, after) = (grpo(share, tmp_path / str(share), monkeypatch, size, **settings) for share in (False, True))
    assert len(usual) > 1 and usual.grad_norm.gt(0).all() and usual["completions/mean_length"].nunique() > 1
    if size.rows_per_pass < 16: usual, ours = (log.drop(columns="entropy") for log in (usual, ours))  # a mean over tokens of a pass, then over passes: depends on which rollouts meet in one
    np.testing.assert_allclose(ours.to_numpy(float), usual.to_numpy(float), rtol=2e-4, atol=1e-5)
    assert max((before[n] - after[n]).abs().max().item() for n in before) < 1e-5 and before.keys() == after.keys()


def test_switched_off_it_is_trl_to_the_bit(tmp_path, monkeypatch):
    log, weights = grpo(False, tmp_path / "a", monkeypatch, consistency=False)
    monkeypatch.setattr(rsground_nb.train, "SpatialGRPOTrainer", GRPOTrainer)
    same_log, same = grpo(False, tmp_path / "b", monkeypatch, consistency=False)
    pd.testing.assert_frame_equal(log, same_log)
    assert all(weights[n].equal(same[n]) for n in same)


def test_same_training_run_on_two_processes(tmp_path):
    subprocess.run([sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "--rdzv-backend", "c10d", "--rdzv-endpoint", "localhost:0", __file__, str(tmp_path)], check=True, timeout=300)
    (usual, a), (ours, b), (other, c) = (torch.load(tmp_path / f"{name}.pt", weights_only=False) for name in ("False0", "True0", "True1"))
    np.testing.assert_allclose(ours, usual, rtol=2e-4, atol=1e-5)
    assert all(torch.allclose(a[n], b[n], atol=1e-5) and b[n].equal(c[n]) for n in a) and any(not a[n].equal(p) for n, p in load_tiny()[0].named_parameters() if n in a)


@pytest.mark.parametrize("settings, reason", [(dict(per_device_train_batch_size=6, gradient_accumulation_steps=2), "whole groups"), (dict(top_p=0.9), "top_p"), (dict(generation_kwargs=dict(num_beams=2)), "num_beams")])
def test_refused(settings, reason, tmp_path):
    model, processor = load_vlm("tiny")
    with pytest.raises(ValueError, match=reason): grpo_trainer(model, processor, grpo_rows(load_data("scenes", SMALL, 0)[0]["train"]), codec_of("qwen3_vl", processor), SMALL, 0, tmp_path, disable_tqdm=True, **settings)
    model.set_attn_implementation("eager")
    with pytest.raises(ValueError, match="eager"): share_attention(model)


if __name__ == "__main__":  # one of two processes
    out = Path(sys.argv[1])
    for share in (False, True):
        log, weights = grpo(share, out / str(share), pytest.MonkeyPatch(), gradient_accumulation_steps=1)
        torch.save((log.to_numpy(float) if len(log) else None, weights), out / f"{share}{os.environ['RANK']}.pt")
