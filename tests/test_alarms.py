"""`rsground train doctor`: real GRPO runs of the tiny model that fail in each way, their logs in all three
formats, the committed healthy logs, and files that are no log."""
import json
import re

import numpy as np
import pandas as pd
import pytest
from transformers import PrinterCallback
from trl import GRPOConfig, GRPOTrainer

from conftest import ROOT
from rsground_nb.alarms import examine_log, lasting, read_log, term_table, trend
from rsground_nb.data import to_dataset
from rsground_nb.model import DIRECT, adapt, load_tiny, to_prompt
from rsground_nb.rewards import text_of
from rsground_nb.run import main
from rsground_nb.scale import start
from rsground_nb.scenes import scene_records
from rsground_nb.train import never_drawn


def near_reward(completions, wanted, **columns):
    """1 minus the distance of the first number from the wanted one, both as shares of the image's width."""
    found = [re.match(r"\[(\d+)", text_of(c)) for c in completions]
    return [1 - min(1, abs(int(f[1]) / 1000 - w)) if f else 0.0 for f, w in zip(found, wanted)]


def format_reward(completions, **columns): return [float(text_of(c).endswith("]")) for c in completions]


def lost_reward(completions, **columns): return [0.0] * len(completions)  # say, boxes in the wrong unit


def constant_reward(completions, wanted, **columns): return list(wanted)  # the same for all of a group


def questions(wanted, seed=0):
    """Two questions; the first number of the answer should be `wanted`, a share of the width."""
    rows = scene_records(2, seed)
    kept = to_dataset(rows).select_columns(["image"]).add_column("wanted", [wanted] * 2)
    return kept.add_column("prompt", [to_prompt(r["expression"], DIRECT) for r in rows])


@pytest.fixture(scope="module")
def tiny():
    model, processor = load_tiny()
    return model, processor, {n: w.clone() for n, w in model.state_dict().items()}


def train(tiny, folder, rewards=near_reward, held_out=None, **changed):
    """A run of TRL's own trainer; returns the path of its trainer_state.json."""
    model, processor, weights = tiny
    start(0)
    model.load_state_dict(weights)
    usual = dict(output_dir=str(folder), max_steps=2, per_device_train_batch_size=16, num_generations=8,
                 max_completion_length=24, learning_rate=1e-3, lr_scheduler_type="constant", logging_steps=1,
                 save_strategy="no", report_to="none", use_cpu=True, bf16=False, disable_tqdm=True, seed=0,
                 activation_checkpointing=False,
                 generation_kwargs=dict(suppress_tokens=never_drawn(processor)))
    trainer = GRPOTrainer(model=model, reward_funcs=rewards, args=GRPOConfig(**{**usual, **changed}),
                          train_dataset=questions(0.6), eval_dataset=held_out, processing_class=processor,
                          peft_config=adapt(model, 0))
    trainer.remove_callback(PrinterCallback)
    trainer.train()
    trainer.state.save_to_json(str(folder / "trainer_state.json"))
    return folder / "trainer_state.json"


def told(log):
    """The names of the alarms, and of the remarks, of a log with one run."""
    (run,) = read_log(log)
    symptoms, _ = examine_log(run)
    return {s.name for s in symptoms if s.alarm}, {s.name for s in symptoms if not s.alarm}


EVALUATED = dict(eval_strategy="steps", eval_steps=3, per_device_eval_batch_size=16, max_steps=12)


@pytest.mark.parametrize("fault, alarms", [
    (dict(rewards=constant_reward), {"groups without signal", "gradient zero"}),
    (dict(max_completion_length=5), {"truncation"}),
    (dict(max_completion_length=5, mask_truncated_completions=True), {"truncation", "gradient zero"}),
    (dict(temperature=1e-4), {"entropy gone", "groups without signal", "gradient zero"}),
    (dict(num_iterations=4, beta=1e-4, learning_rate=1e-2, max_steps=8), {"clip", "KL"}),
    (dict(beta=0.04, learning_rate=1e-9), {"KL"}),
    (dict(rewards=[format_reward, lost_reward], temperature=2.0),
     {"format only", "a reward that nobody earns"}),
    (dict(rewards=[near_reward, format_reward], reward_weights=[1.0, 0.01], temperature=2.0),
     {"a reward that cannot be heard"}),
], ids=lambda case: None)
def test_a_run_that_fails_is_told_why(tiny, tmp_path, fault, alarms):
    assert told(train(tiny, tmp_path, **fault))[0] == alarms
