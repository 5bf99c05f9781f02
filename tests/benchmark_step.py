"""Whole GRPO steps: trl.GRPOTrainer against SharedPromptTrainer (deeper/rollouts), in one process, taking
turns, on the same questions from the same seed.

    python tests/benchmark_step.py --prompts 4 --tokens 64 256 --generations 8
        about 4 minutes of one core; --generations 4 16 --ways all --rounds 4: 4 more
    python tests/benchmark_step.py --prompts 2 --tokens 900 --rounds 5 --generations 8
        about 4; --generations 4 16 --ways all: 4 more (these four made the table)
    python tests/benchmark_step.py --model RUN/sft/model --ways all
        completions end where the model ends them (a workshop run's CoT-SFT model)
    python tests/benchmark_step.py --device cuda --shape 3b --ways all
        Qwen2.5-VL-3B with random weights, LoRA of rank 64, bfloat16, activation
        checkpointing. NOT RUN BY US: we had no GPU.

Rows of the setting are replaced in tests/benchmark_step.csv. Without --model every completion has --length
tokens, because the end token is never drawn: no padding, which is the best case for TRL. A step is everything
between two optimiser steps: images, prompts, rollouts, rewards, loss, gradients, optimiser. The first round
warms up. `ratio` is the geometric mean over rounds of TRL's time over ours (processor time on a CPU, wall
time on a GPU), with a 95 % t interval. `text_tokens` and `patches` are what went through language model and
vision tower in a step. `peak_mib` is how far a fresh process with one trainer grows in its first step beyond
what it held before (resident memory; on a GPU, what PyTorch allocated). The tiny shape is the shipped model:
patches of 16 px, one token each.
"""
import argparse
import gc
import subprocess
import sys
import tempfile
import time
import warnings
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from datasets import disable_progress_bar
from scipy.stats import t
from transformers import AutoModelForImageTextToText, GenerationConfig, TrainerCallback
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil
from trl import GRPOConfig, GRPOTrainer

from benchmark_learning import add_rows
from benchmark_memory import shapes
from rsground_nb.data import load_data
from rsground_nb.guards import SpatialGRPOConfig
from rsground_nb.loading import TEMPLATES, GroundingProcessor
from rsground_nb.model import SPECIAL, adapt, codec_of, load_vlm, make_tokenizer
from rsground_nb.rewards import REWARD_WEIGHTS, make_rewards
from rsground_nb.rollouts import SharedPromptTrainer
from rsground_nb.scale import get_scale, start
from rsground_nb.train import grpo_rows

TABLE = Path(__file__).parent / "benchmark_step.csv"
SETTING = ["shape", "device", "visual_tokens", "generations", "completions", "way"]
WAYS = {"stock": None, "all": True, "image": ("image",), "prefill": ("prefill",), "loss": ("loss",)}


def model_3b(layers, device):
    """Qwen2.5-VL-3B from its published widths with random weights, and a processor with the tiny model's
    tokenizer; `layers` below 36 (and a tower of 4) is for a look without a GPU."""
    tokenizer = make_tokenizer()
    _, config = next(shapes(layers))
    config.vision_config.depth = 32 if layers == 36 else 4
    config.vision_config.fullatt_block_indexes = [7, 15, 23, 31] if layers == 36 else [3]
    for name, token in dict(image="image_pad", video="video_pad", vision_start="vision_start",
                            vision_end="vision_end").items():
        setattr(config, f"{name}_token_id", tokenizer.convert_tokens_to_ids(f"<|{token}|>"))
    config.text_config.bos_token_id, config.text_config.eos_token_id, config.text_config.pad_token_id = (
        None, tokenizer.eos_token_id, tokenizer.pad_token_id)
    with torch.device(device):
        model = AutoModelForImageTextToText.from_config(config, dtype=torch.bfloat16 if device == "cuda"
                                                        else torch.float32)
    model.generation_config = GenerationConfig(eos_token_id=tokenizer.eos_token_id,
                                               pad_token_id=tokenizer.pad_token_id)
    eyes = Qwen2VLImageProcessorPil(patch_size=14, merge_size=2, temporal_patch_size=2,
                                    size={"shortest_edge": 56 * 56, "longest_edge": 2 ** 21})
    return model, GroundingProcessor(eyes, tokenizer, chat_template=TEMPLATES["qwen2_5_vl"])


class Watch(TrainerCallback):
    """Time, tokens and patches of each step."""

    def __init__(self, model):
        self.steps, self.seen = [], dict(text_tokens=0, patches=0)
        base = model.get_base_model() if hasattr(model, "peft_config") else model
        base.model.language_model.register_forward_pre_hook(lambda module, given, named: self.count(
            "text_tokens", named["inputs_embeds"].shape[:2].numel()), with_kwargs=True)
        base.model.visual.register_forward_pre_hook(lambda module, given: self.count("patches",
                                                                                     len(given[0])))

    def count(self, name, number): self.seen[name] += number

    def clock(self):
        if torch.cuda.is_available(): torch.cuda.synchronize()
        return np.array([time.process_time(), time.perf_counter()])

    def on_step_begin(self, *given, **named):
        self.seen, self.began = dict.fromkeys(self.seen, 0), self.clock()

    def on_step_end(self, *given, **named):
        cpu, wall = self.clock() - self.began
        self.steps.append(dict(cpu_s=cpu, wall_s=wall, **self.seen))


def trainer_of(way, o, tokens, generations, folder):
    """A trainer and its watch. Ways differ in nothing but class and `share_prompt`."""
    start(o.seed)
    gpu, tiny = o.device == "cuda", o.shape == "tiny"
    side = int(tokens ** 0.5) * (16 if tiny else 28)
    model, processor = load_vlm(o.model or "tiny", side * side) if tiny else model_3b(o.layers, o.device)
    disable_progress_bar()
    rows = grpo_rows(load_data("scenes", get_scale("smoke"), o.seed)[0]["train"].select(range(32))).map(
        lambda row: dict(image=row["image"].resize((side, side))))
    blocked = processor.tokenizer.convert_tokens_to_ids(SPECIAL + [processor.tokenizer.eos_token]
                                                        * (o.model is None))
    rollouts, share = (o.prompts * generations,
                       {} if way == "stock" else dict(share_prompt=WAYS[way], consistency=False))
    per_pass = generations if gpu else rollouts
    args = (GRPOConfig if way == "stock" else SpatialGRPOConfig)(
        output_dir=str(folder), max_steps=1, per_device_train_batch_size=per_pass,
        gradient_accumulation_steps=rollouts // per_pass, num_generations=generations,
        max_completion_length=160 if o.model else o.length, generation_kwargs=dict(suppress_tokens=blocked),
        temperature=0.8, learning_rate=1e-6, loss_type="grpo", beta=0.0, reward_weights=REWARD_WEIGHTS,
        save_strategy="no", report_to="none", use_cpu=not gpu, bf16=gpu,
        activation_checkpointing=gpu, disable_tqdm=True, seed=o.seed, **share)
    trainer = (GRPOTrainer if way == "stock" else SharedPromptTrainer)(
        model=model, reward_funcs=make_rewards(codec_of(model.config.model_type, processor)), args=args,
        train_dataset=rows, processing_class=processor, peft_config=adapt(model, 0 if tiny else 64))
    watch = Watch(trainer.model)
    trainer.add_callback(watch)
    return trainer, watch


def peak(o):
    """MiB by which this process grows in one step of its only trainer. A step on a small picture goes before
    and takes what libraries keep for good."""
    with tempfile.TemporaryDirectory() as folder:
        trainer_of("stock", o, 16, 2, folder)[0].train()
        trainer, _ = trainer_of(o.peak, o, o.tokens[0], o.generations[0], folder)
        gc.collect()
        if o.device == "cuda":
            torch.cuda.reset_peak_memory_stats(); before = torch.cuda.memory_allocated()
            trainer.train()
            return (torch.cuda.max_memory_allocated() - before) / 2 ** 20
        Path("/proc/self/clear_refs").write_text("5")  # Linux: the highest resident size counts from here
        before = resident("VmRSS")
        trainer.train()
        return (resident("VmHWM") - before) / 1024


def resident(name): return int(Path("/proc/self/status").read_text().split(f"{name}:")[1].split()[0])  # kB


def compare(o, tokens, generations):
    """Rows of one setting: one for TRL, one for each way."""
    ways = ["stock", *o.ways]
    with tempfile.TemporaryDirectory() as folder:
        trainers = {way: trainer_of(way, o, tokens, generations, folder) for way in ways}
        for k in range(o.rounds + 1):
            for way in ways if k % 2 else ways[::-1]: trainers[way][0].train()
    steps = {way: pd.DataFrame(watch.steps[1:]) for way, (_, watch) in trainers.items()}
    for way in ways:
        mean, row = steps[way].mean(), dict(zip(SETTING,
                                                (o.shape, o.device, tokens, generations, f"{o.length} tokens"
                                                 if o.model is None else "CoT-SFT model's", way)))
        logs = np.log(steps["stock"] / steps[way])["wall_s" if o.device == "cuda" else "cpu_s"]
        wide = t.ppf(0.975, o.rounds - 1) * logs.std(ddof=1) / o.rounds ** 0.5
        row |= dict(prompts=o.prompts, rounds=o.rounds, seed=o.seed,
                    **mean, **{name: np.exp(logs.mean() + shift)
                               for name, shift in (("ratio", 0), ("ratio_low", -wide), ("ratio_high", wide))})
        if way in ("stock", "all"):
            again = ([sys.executable, __file__, "--peak", way,
                      "--tokens", str(tokens), "--generations", str(generations)]
                     + [part for name in ("device", "shape", "layers", "prompts", "length", "seed", "model")
                        if getattr(o, name) is not None for part in (f"--{name}", str(getattr(o, name)))])
            row["peak_mib"] = float(subprocess.run(again, check=True, capture_output=True, text=True)
                                    .stdout.split()[-1])
        yield row


def main():
    warnings.filterwarnings("ignore", category=FutureWarning)  # of libraries among themselves
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--tokens", type=int, nargs="+", default=[64, 256, 900])
    parser.add_argument("--generations", type=int, nargs="+", default=[4, 8, 16])
    parser.add_argument("--ways", nargs="*", choices=list(WAYS)[1:], default=list(WAYS)[1:])
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--shape", choices=["tiny", "3b"], default="tiny")
    for name, default in (("rounds", 6), ("prompts", 2), ("length", 64), ("seed", 0), ("layers", 36)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--model", help="folder of a model of the tiny shape")
    parser.add_argument("--peak", help=argparse.SUPPRESS)  # of one way, in a process of its own
    o = parser.parse_args()
    if o.peak: return print(peak(o))
    for tokens in o.tokens:
        for generations in o.generations:
            new = pd.DataFrame(compare(o, tokens, generations)).round(4)
            print(new[["visual_tokens", "generations", "way", "cpu_s", "wall_s", "ratio", "ratio_low",
                       "ratio_high", "text_tokens", "patches", "peak_mib"]].to_string(index=False),
                  flush=True)
            add_rows(new, TABLE, SETTING)


if __name__ == "__main__": main()
