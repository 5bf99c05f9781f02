"""A CPU step of SFT and of GRPO with and without what was tried to make it faster, and where its time goes.

    python tests/benchmark_speed.py            both stages; about 5 minutes of one core
    python tests/benchmark_speed.py --stage sft --ways plain head

Each way is a process with one trainer of the shipped model; the processes take turns, one step each (SFT:
two), so that a busy minute hits all. `ratio` is the geometric mean over rounds of the processor time of
`plain` over that of the way, with a 95 % t interval; the first round warms up. `share_*` are the parts of
a step (`head` is part of `forward`). Rows of the setting are replaced in tests/benchmark_speed.csv. SFT:
all weights, 16 rows of the rule teacher's chains; `rows 8` is what one of two processes does in a step.
GRPO: 8 questions with 8 rollouts of 40 tokens, all weights, rewards of chapter 7; 64 rows in a pass, or
16. `norms` (torch's F.rms_norm in place of transformers' RMSNorm) and `rows 16` gained less than 5 % or
nothing and are not used by the package.
"""
import argparse
import json
import subprocess
import sys
import tempfile
import time
import warnings
from dataclasses import replace
from functools import wraps
from pathlib import Path

import numpy as np
import pandas as pd
import torch
import torch.nn.functional as F
import trl.trainer.utils as trl_utils
from datasets import disable_progress_bar
from scipy.stats import t
from transformers import TrainerCallback
from transformers.models.qwen3_vl.modeling_qwen3_vl import Qwen3VLTextRMSNorm
from trl import SFTTrainer

import rsground_nb.rollouts
import rsground_nb.scale
from benchmark_learning import add_rows
from rsground_nb.data import load_data
from rsground_nb.model import codec_of, load_vlm
from rsground_nb.scale import get_scale, start
from rsground_nb.sft import AnswersTrainer, sft_trainer
from rsground_nb.synthesis import load_chains, make_chains
from rsground_nb.train import grpo_rows, grpo_trainer, never_drawn

TABLE = Path(__file__).parent / "benchmark_speed.csv"
WAYS = dict(sft=["plain", "head", "memory", "head+memory", "head+rows 8"],
            grpo=["plain", "memory", "norms", "rows 16", "memory+rows 16", "memory+rows 16+norms"])
SIZE = replace(get_scale("workshop"), num_train=256, num_val=2, num_test=2, sft_steps=3, grpo_steps=1,
               prompts_per_step=8, max_completion_length=40, rows_per_pass=64)


class Clock(TrainerCallback):
    """Processor time of steps and of their parts: from begin to end (whole), or from one end to the next."""

    def __init__(self, whole): self.whole, self.parts, self.ends = whole, {}, []

    def on_step_begin(self, *given, **named):
        if self.whole: self.parts, self.ends = {}, [time.process_time()]

    def on_pre_optimizer_step(self, *given, **named): self.before = time.process_time()

    def on_optimizer_step(self, *given, **named): self.add("optimiser", time.process_time() - self.before)

    def on_step_end(self, *given, **named):
        self.ends.append(time.process_time())
        if len(self.ends) == 1: self.parts = {}

    def add(self, name, seconds): self.parts[name] = self.parts.get(name, 0.0) + seconds

    def watch(self, name, owner, attribute):
        work = getattr(owner, attribute)
        @wraps(work)
        def watched(*given, **named):
            began = time.process_time()
            try: return work(*given, **named)
            finally: self.add(name, time.process_time() - began)
        setattr(owner, attribute, watched)

    def step(self):
        """Seconds of a step, and its parts as shares."""
        steps = len(self.ends) - 1
        whole = (self.ends[-1] - self.ends[0]) / steps
        shares = {f"share_{name}": seconds / steps / whole for name, seconds in self.parts.items()}
        return dict(cpu_s=whole, **shares)


def trainer_of(stage, levers, folder):
    """The trainer of a way, and its clock."""
    if "memory" not in levers: rsground_nb.scale.keep_memory = lambda: None
    if "head" not in levers: AnswersTrainer.compute_loss = SFTTrainer.compute_loss
    if "norms" in levers:
        fused = lambda self, x: F.rms_norm(x, self.weight.shape, self.weight, self.variance_epsilon)
        Qwen3VLTextRMSNorm.forward = fused
    size = replace(SIZE, rows_per_pass=16 if "rows 16" in levers else 64)
    size = replace(size, sft_batch_size=8 if "rows 8" in levers else 16)
    start(0)
    model, processor = load_vlm("tiny")
    rows, codec = load_data("scenes", size, 0)[0]["train"], codec_of(model.config.model_type, processor)
    clock = Clock(whole=stage == "grpo")
    if stage == "sft":
        make_chains(rows, codec, folder / "chains", seed=0)
        chains = load_chains(folder / "chains", rows, codec)
        trainer = sft_trainer(model, processor, chains, size, 0, folder, disable_tqdm=True)
        clock.watch("batch", trainer, "data_collator")
        clock.watch("forward", trainer, "compute_loss")
        head = trl_utils._ChunkedLogProbFunction
        trl_utils._ChunkedLogProbFunction = type("Head", (), dict(apply=head.apply))
        clock.watch("head", trl_utils._ChunkedLogProbFunction, "apply")
    else:
        never = never_drawn(processor) + [processor.tokenizer.eos_token_id]  # all rollouts have 40 tokens
        trainer = grpo_trainer(model, processor, grpo_rows(rows), codec, size, 0, folder, disable_tqdm=True,
                               generation_kwargs=dict(suppress_tokens=never), patience_without_signal=0)
        clock.watch("batch", trainer, "_tokenize_prompts")
        clock.watch("write", rsground_nb.rollouts, "write_batch")
        clock.watch("rewards", trainer, "_calculate_rewards")
        clock.watch("forward", trainer, "compute_loss")
    clock.watch("backward", trainer.accelerator, "backward")
    trainer.add_callback(clock)
    return trainer, clock


def worker(stage, way):
    """A process of one way: a line comes in, a step is done, its numbers go out."""
    warnings.filterwarnings("ignore")
    disable_progress_bar()
    say, sys.stdout = sys.stdout, sys.stderr
    with tempfile.TemporaryDirectory() as folder:
        trainer, clock = trainer_of(stage, way.split("+"), Path(folder))
        print("ready", file=say, flush=True)
        for _ in sys.stdin:
            clock.ends = []
            trainer.train()
            print(json.dumps(clock.step()), file=say, flush=True)


def compare(stage, ways, rounds):
    """A row for each way."""
    call = [sys.executable, __file__, "--stage", stage, "--worker"]
    pipes = dict(stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    workers, steps = {way: subprocess.Popen([*call, way], **pipes) for way in ways}, {way: [] for way in ways}
    for way in ways:
        if workers[way].stdout.readline() != "ready\n":
            sys.exit(f"{stage}, {way}: no trainer; try --worker '{way}' to see why")
    for k in range(rounds + 1):
        for way in ways if k % 2 else ways[::-1]:
            print("go", file=workers[way].stdin, flush=True)
            steps[way].append(json.loads(workers[way].stdout.readline()))
        print(f"{stage}: round {k} of {rounds}", flush=True)
    for one in workers.values(): one.communicate()
    tables = {way: pd.DataFrame(rows[1:]) for way, rows in steps.items()}
    for way, table in tables.items():
        logs = np.log(tables["plain"].cpu_s / table.cpu_s)
        wide = t.ppf(0.975, rounds - 1) * logs.std(ddof=1) / rounds ** 0.5
        shifts = dict(ratio=0, ratio_low=-wide, ratio_high=wide)
        ratios = {name: np.exp(logs.mean() + shift) for name, shift in shifts.items()}
        parts = table.drop(columns="cpu_s").mean()
        yield dict(stage=stage, way=way, seed=0, rounds=rounds, cpu_s=table.cpu_s.median(), **ratios, **parts)


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--stage", choices=list(WAYS), nargs="+", default=list(WAYS))
    parser.add_argument("--ways", nargs="+", help="`plain` first")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    o = parser.parse_args()
    torch.set_num_threads(1)
    if o.worker: return worker(o.stage[0], o.worker)
    for stage in o.stage:
        new = pd.DataFrame(compare(stage, o.ways or WAYS[stage], o.rounds)).round(4)
        print(new.to_string(index=False), flush=True)
        add_rows(new, TABLE, ["stage", "way"])


if __name__ == "__main__": main()
