"""Numbers of 16 bit: which weights move, what is left of LoRA after merging, and steps
that a GradScaler leaves out."""
import math
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from peft import get_peft_model

from rsground_nb.data import to_dataset
from rsground_nb.guards import SpatialGRPOConfig
from rsground_nb.memory import memory_plan
from rsground_nb.model import adapt, check_moving, codec_of, load_tiny, load_vlm, merged, training_dtype
from rsground_nb.run import main
from rsground_nb.safeguard import Safeguard
from rsground_nb.scale import get_scale, start
from rsground_nb.scenes import scene_records
from rsground_nb.sft import sft_trainer
from rsground_nb.synthesis import synthesise
from rsground_nb.train import grpo_rows, grpo_trainer

SIZE = replace(get_scale("smoke"), lora_rank=0, sft_steps=8, sft_batch_size=2, sft_learning_rate=1e-5,
               prompts_per_step=2, num_generations=2, max_completion_length=8)
ROWS = to_dataset(list(scene_records(4, 0)))


def trainer_for(folder, dtype, size=SIZE, **settings):
    start(0)
    model, processor = load_vlm("tiny", dtype=dtype)
    chains, _ = synthesise(ROWS, codec_of(model.config.model_type, processor))
    return sft_trainer(model, processor, chains, size, 0, folder, disable_tqdm=True,
                       lr_scheduler_type="constant", warmup_steps=0, **settings)


def share_moved(trainer):
    before = {n: p.detach().clone() for n, p in trainer.model.named_parameters() if p.requires_grad
              and p.ndim > 1 and "embed" not in n}
    trainer.train()
    after = dict(trainer.model.named_parameters())
    return ((sum((after[n] != p).sum() for n, p in before.items()) / sum(p.numel() for p in before.values()))
            .item())


def test_weights_of_32_bits_move_and_of_16_bits_would_hardly(tmp_path, monkeypatch):
    """Eight steps at 1e-5 with autocast."""
    assert share_moved(trainer_for(tmp_path / "32", torch.float32, bf16=True)) > 0.99
    monkeypatch.setattr("rsground_nb.sft.check_moving", lambda model: None)
    assert share_moved(trainer_for(tmp_path / "16", torch.bfloat16, bf16=True)) < 0.2


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_weights_of_16_bits_are_refused_by_name_unless_lora_moves(tmp_path, dtype):
    with pytest.raises(ValueError, match=r"weights are trained in 16 bits "
                       r"\(model.language_model.*dtype float32"):
        trainer_for(tmp_path, dtype)
    model, processor = load_vlm("tiny", dtype=dtype)
    with pytest.raises(ValueError, match="weights are trained in 16 bits"):
        grpo_trainer(model, processor, grpo_rows(ROWS), codec_of("qwen3_vl", processor), SIZE, 0, tmp_path,
                     share_prompt=False)
    lora = trainer_for(tmp_path, dtype, replace(SIZE, lora_rank=4)).model
    check_moving(lora)
    assert {p.dtype for p in lora.parameters() if p.requires_grad} == {torch.float32}
    lora.base_model.model.lm_head.requires_grad_(True)  # tied to the embeddings
    with pytest.raises(ValueError, match="^1 weights .*embed_tokens"): check_moving(lora)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "auto"])
@pytest.mark.parametrize("stage", ["sft", "grpo"])
def test_the_command_line_refuses_them_before_anything_is_loaded(tmp_path, capsys, stage, dtype):
    words = (f"train {stage} --config tiny_{stage}.yaml --model_name_or_path no/such --use_peft false "
             f"--dtype {dtype} --output_dir {tmp_path}")
    assert main(words.split()) == 2
    assert f"dtype: {dtype} with use_peft: false" in capsys.readouterr().err


def test_a_gpu_changes_what_is_frozen_and_nothing_else(monkeypatch):
    for gpu, rank, dtype in ((False, 0, torch.float32), (False, 8, torch.float32), (True, 0, torch.float32),
                             (True, 8, torch.bfloat16)):
        monkeypatch.setattr(torch.cuda, "is_available", lambda: gpu)
        assert training_dtype(rank) == dtype
        assert load_vlm("tiny", dtype=training_dtype(rank))[0].dtype == dtype
        assert load_vlm("tiny")[0].dtype == torch.float32  # as the folder says


def test_generation_that_casts_the_weights_is_refused(tmp_path):
    with pytest.raises(ValueError, match="use_transformers_continuous_batching"):
        SpatialGRPOConfig(str(tmp_path), use_transformers_continuous_batching=True, bf16=True, use_cpu=True)
    assert SpatialGRPOConfig(str(tmp_path), use_transformers_continuous_batching=True, bf16=False,
                             use_cpu=True).use_transformers_continuous_batching


def test_the_plan_counts_32_bits_for_what_moves():
    model, _ = load_tiny()
    count = sum(p.numel() for p in model.parameters())
    moving = sum(p.numel() for n, p in model.named_parameters() if "visual" not in n)
    for dtype, each in ((torch.float32, 4), (torch.bfloat16, 6)):
        plan = memory_plan(model.config, rank=0, dtype=dtype) * 2 ** 30
        assert (plan["weights"] == each * count and plan["gradients"] == 4 * moving
                and plan["Adam"] == 8 * moving and plan["LoRA weights"] == 0)


@pytest.mark.parametrize("spread", [1e-4, 1e-3])
def test_merging_keeps_small_updates(spread):
    """How much of B A is found again in the merged weights: the projection on it."""
    start(0)
    model = get_peft_model(load_vlm("tiny", dtype=torch.bfloat16)[0], adapt(load_vlm("tiny")[0], 8))
    layers = {n: m for n, m in model.named_modules() if hasattr(m, "lora_B")}
    for layer in layers.values(): torch.nn.init.normal_(layer.lora_B["default"].weight, std=spread)
    before, change = ({n: f(m) for n, m in layers.items()}
                      for f in (lambda m: m.base_layer.weight.detach().double(),
                                lambda m: m.get_delta_weight("default").detach().double()))
    def kept(whole):
        after = dict(whole.named_modules())
        moved = {n: after[n.removeprefix("base_model.model.")].weight.detach().double() - before[n]
                 for n in layers}
        return (sum((moved[n] * change[n]).sum() for n in layers)
                / sum((change[n] ** 2).sum() for n in layers)).item()
    whole = merged(model)
    assert whole.dtype == torch.float32 and kept(whole) == pytest.approx(1, abs=1e-3)
    assert abs(kept(whole.bfloat16()) - 1) > 1e-3  # what is lost where the result is rounded to 16 bit


# steps that a GradScaler leaves out

def scaled(folder, scale, poison=None):
    """The SFT trainer with PyTorch's own GradScaler; on a CPU accelerate makes none by itself."""
    trainer = trainer_for(folder, torch.float32, replace(SIZE, sft_learning_rate=1e-3), max_grad_norm=0)
    trainer.accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=scale)
    trainer.add_callback(Safeguard())
    if poison: trainer.model.get_input_embeddings().register_forward_hook(lambda *given: given[-1] * math.nan)
    return trainer


def test_an_overflow_costs_a_step_and_no_more(tmp_path):
    """The squares inside the layers' norms leave float32 at a scale of about 2 ** 60."""
    trainer = scaled(tmp_path, 2.0 ** 62)
    assert share_moved(trainer) > 0.99
    left_out = 62 - math.log2(trainer.accelerator.scaler.get_scale())
    assert (1 <= left_out <= 6 and trainer.state.global_step == 8
            and all(p.isfinite().all() for p in trainer.model.parameters()))


def test_a_gradient_that_is_not_finite_at_any_scale_stops_the_training(tmp_path):
    trainer = scaled(tmp_path, 8.0, poison=True)
    before = {n: p.detach().clone() for n, p in trainer.model.named_parameters()}
    with pytest.raises(FloatingPointError, match="the gradient is not finite"): trainer.train()
    # 8, 4, 2: three steps left out
    assert trainer.state.global_step == 3 and trainer.accelerator.scaler.get_scale() == 1
    assert all(p.equal(before[n]) for n, p in trainer.model.named_parameters())


def test_without_a_scaler_the_first_one_stops_it():
    layer = torch.nn.Linear(2, 2)
    layer.weight.grad = torch.full((2, 2), math.inf)
    for optimizer in (None, SimpleNamespace(), SimpleNamespace(scaler=None)):
        with pytest.raises(FloatingPointError):
            Safeguard().on_pre_optimizer_step(None, None, None, model=layer, optimizer=optimizer)
