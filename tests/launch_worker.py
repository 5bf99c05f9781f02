"""One process of a distributed training for tests/test_launch.py: `rsground train` for
every line of a file, on the CPU.

    accelerate launch --config_file rsground_nb/configs/accelerate/fsdp_8gpus.yaml --num_processes 2
    --mixed_precision no tests/launch_worker.py LINES

A line says ddp or fsdp, then what follows `rsground train`.
Rollouts are drawn from numbers that depend on the place in the group and the token only, so that any number
of processes draws the same; a reward for the length of a completion makes them differ.
accelerate applies FSDP on GPUs only; for fsdp it is made to take these processes for GPUs, and
FSDP2 shards over them by gloo.
"""
import functools
import math
import os
import sys
from pathlib import Path

import torch
from accelerate import PartialState
from accelerate.utils import DistributedType

import rsground_nb.launch as launch
import rsground_nb.rollouts as rollouts
from rsground_nb.rewards import text_of
from rsground_nb.run import main

GROUP = 8


class Draw:
    """draw_tokens of deeper/rollouts with known numbers instead of random ones."""

    def __init__(self): self.token = 0

    def __call__(self, chances):
        self.token += 1
        running = chances.double().cumsum(-1)
        numbers = [math.sin(12.9898 * (row % GROUP + 1) + 78.233 * self.token) * 43758.5453 % 1
                   for row in range(len(chances))]
        return torch.searchsorted(running, torch.tensor(numbers, dtype=torch.double)[:, None]
                                  * running[:, -1:], right=True)[:, 0]


def known_rollouts(patch=setattr):
    """Every call of write_rollouts draws the same numbers, and finished rollouts stay in the batch, so that a
    row's place does not change."""
    write, rewards = rollouts.write_rollouts, launch.make_rewards
    def length_reward(completions, **columns): return [len(text_of(c)) % 7 / 7 for c in completions]
    patch(rollouts, "write_rollouts",
          functools.wraps(write)(lambda *given, **named: write(*given, **named, draw=Draw(), least_live=0.0)))
    patch(launch, "make_rewards", lambda *given: [length_reward, *rewards(*given)[1:]])


def as_if_on_gpus():
    """Where FSDP is asked for, accelerate takes processes on the CPU for processes on GPUs."""
    begin = PartialState.__init__
    def pretend(self, *given, **named):
        begin(self, *given, **named)
        if os.environ["ACCELERATE_USE_FSDP"] == "true" and self.distributed_type == DistributedType.MULTI_CPU:
            PartialState._shared_state["distributed_type"] = DistributedType.MULTI_GPU
    PartialState.__init__ = pretend


if __name__ == "__main__":
    known_rollouts()
    as_if_on_gpus()
    codes = []
    for line in Path(sys.argv[1]).read_text().splitlines():
        kind, *words = line.split()
        os.environ["ACCELERATE_USE_FSDP"] = "true" if kind == "fsdp" else "false"
        codes.append(main(["train", *words]))
    print("exit codes", codes, flush=True)
