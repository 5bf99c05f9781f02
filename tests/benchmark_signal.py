"""How much of a GRPO step is signal? Gradients of independent batches from one and the same
model, and how far they agree.

    python tests/benchmark_signal.py RUN [--batches 12] [--seed 7]

RUN is the folder of a workshop run with seed 0; its CoT-SFT model stays as it is. Each batch is a step of the
workshop scale (32 questions with a rival, 8 rollouts each) on scenes that no training has seen (data seed
77). The same rollouts give one gradient for each way to make advantages:

workshop   as the workshop trains: three rewards, spread of the batch, consistency weight
group      three rewards, each group's own spread, no weight
iou        IoU alone, undivided, no weight: the gradient of the mean IoU itself

cosine     mean over pairs of batches of g_i.g_j, divided by the mean of g_i.g_i: the share of a step's
squared length that is signal. Once for the plain gradient, once with every weight's gradient
           divided by its root mean square over the batches, as Adam's first steps are.
per_step   first-order change of the mean IoU by one Adam-like step at the workshop's learning rate: that
step, made from one batch, times the `iou` gradient of another (length-normalised losses are
           multiplied by the mean length again)
low, high  95 % interval, by the jackknife over batches
"""
import argparse
import tempfile
from dataclasses import replace
from pathlib import Path

import pandas as pd
import torch
from scipy.stats import t

from rsground_nb.bandit import group_advantages
from rsground_nb.data import load_data
from rsground_nb.model import codec_of, load_vlm
from rsground_nb.scale import get_scale, start
from rsground_nb.train import grpo_rows, grpo_trainer, with_rivals

TABLE = Path(__file__).parent / "benchmark_signal.csv"


def gradient(trainer, batch, advantages):
    """Gradient of the loss over all trained weights, one line of numbers; `advantages` of
    shape (questions, rollouts)."""
    trainer.model.zero_grad()
    patches = [0, *batch["image_grid_thw"].prod(1).cumsum(0).tolist()]
    for first in range(0, len(advantages), 8):  # questions at once
        part = slice(first, first + 8)
        rows = {name: x if getattr(x, "ndim", 1) == 0 else x[patches[first]:patches[first + 8]] if name
                == "pixel_values" else x[part] for name, x in {**batch, "advantages": advantages}.items()}
        (trainer.compute_loss(trainer.model, rows) * 8 / len(advantages)).backward()
    return torch.cat([p.grad.flatten() for p in trainer.model.parameters() if p.requires_grad])


def between(steps, gradients):
    """Mean over pairs of different batches of step . gradient, and its 95 % interval by the jackknife."""
    table = (steps @ gradients.T).double().fill_diagonal_(0)
    n = len(table)
    mean = table.sum() / (n * (n - 1))
    without = torch.stack([(table.sum() - table[k].sum() - table[:, k].sum()) / ((n - 1) * (n - 2))
                           for k in range(n)])
    error = ((without - without.mean()) ** 2).sum().mul((n - 1) / n).sqrt()
    return mean.item(), error.item() * t.ppf(0.975, n - 1)


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("run", type=Path)
    parser.add_argument("--batches", type=int, default=12)
    parser.add_argument("--seed", type=int, default=7)
    options = parser.parse_args()
    size = replace(get_scale("workshop"), processes=1)
    start(options.seed)
    model, processor = load_vlm(str(options.run / "sft" / "model"), size.max_pixels)
    rows = grpo_rows(with_rivals(load_data("scenes", size, 77)[0]["train"]))
    rollouts = size.prompts_per_step * size.num_generations
    trainer = grpo_trainer(model, processor, rows, codec_of(model.config.model_type, processor),
                           size, options.seed, tempfile.mkdtemp(), disable_tqdm=True,
                           per_device_train_batch_size=rollouts, gradient_accumulation_steps=1)
    trainer.model.train()
    trainer.current_gradient_accumulation_steps = 1
    batches, found, lengths, ious = (iter(trainer.get_train_dataloader()),
                                     dict(workshop=[], group=[], iou=[]), [], [])
    for k in range(options.batches):
        batch = trainer._generate_and_score_completions(next(batches))
        rewards = {name: torch.tensor(list(values)[-rollouts:]).nan_to_num(0).view(-1, size.num_generations)
                   for name, values in trainer._logs["rewards"].items()}
        total = sum(weight * rewards[name]
                    for name, weight in zip(trainer.reward_func_names, trainer.reward_weights.tolist()))
        iou = rewards["iou_reward"]
        for name, advantages in dict(workshop=batch["advantages"], group=group_advantages(total),
                                     iou=iou - iou.mean(1, keepdim=True)).items():
            found[name].append(gradient(trainer, batch, advantages))
        lengths.append(batch["completion_mask"].sum(-1).float().mean().item())
        ious.append(iou.mean().item())
        print(f"batch {k + 1} of {options.batches}: mean IoU of the rollouts {ious[-1]:.3f}", flush=True)
    table, up = [], -torch.stack(found["iou"]) * sum(lengths) / len(lengths)
    for name, gradients in found.items():
        g = torch.stack(gradients)
        adam = g / g.pow(2).mean(0).sqrt().clamp_min(1e-12)
        row = dict(advantages=name, batches=len(g), rollouts=rollouts, mean_iou=sum(ious) / len(ious),
                   mean_length=sum(lengths) / len(lengths))
        for what, (mean, half) in {
                "cosine": [x / g.pow(2).sum(1).mean().item() for x in between(g, g)],
                "cosine_adam": [x / adam.pow(2).sum(1).mean().item() for x in between(adam, adam)],
                "per_step": [x * size.grpo_learning_rate for x in between(-adam, up)]}.items():
            row |= {what: mean, f"{what}_low": mean - half, f"{what}_high": mean + half}
        table.append(row)
    pd.DataFrame(table).round(6).to_csv(TABLE, index=False)
    print(pd.DataFrame(table).round(4).T.to_string())


if __name__ == "__main__": main()
