"""Both trainers on a few steps: what moves, what must not move, and the same numbers for the same seed."""
import os
import pickle
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import nbformat
import pandas as pd
import pytest

from conftest import ROOT

import rsground_nb.steps
from rsground_nb.data import load_data, to_dataset
from rsground_nb.evaluate import predict, score
from rsground_nb.guards import SpatialGRPOConfig
from rsground_nb.safeguard import on_processes
from rsground_nb.train import grpo_rows, grpo_trainer, with_rivals
from rsground_nb.model import codec_of, fingerprints, load_vlm
from rsground_nb.scale import get_scale, start
from rsground_nb.sft import sft_trainer
from rsground_nb.steps import Run
from rsground_nb.synthesis import synthesise

SMALL = replace(get_scale("smoke"), num_train=16, num_val=2, num_test=8, lora_rank=64, sft_steps=3,
                sft_batch_size=4, sft_learning_rate=8e-3, grpo_steps=2, grpo_learning_rate=5e-4,
                prompts_per_step=2, num_generations=4, max_completion_length=24, rows_per_pass=8)


def short_path(folder, seed):
    """SFT and GRPO for a few steps; returns the log of rewards and the metrics."""
    start(seed)
    splits, _ = load_data("scenes", SMALL, seed)
    model, processor = load_vlm("tiny")
    codec = codec_of(model.config.model_type, processor)
    trainer = sft_trainer(model, processor, synthesise(splits["train"], codec)[0], SMALL, seed,
                          folder / "sft", disable_tqdm=True)
    trainer.train()
    model = trainer.model.merge_and_unload()
    trainer = grpo_trainer(model, processor, grpo_rows(splits["train"]), codec, SMALL, seed, folder / "grpo",
                           disable_tqdm=True)
    trainer.train()
    timings = ("train_", "step_time", "epoch")
    log = pd.DataFrame(trainer.state.log_history)
    return (log[[c for c in log if not c.startswith(timings)]],
            score(predict(trainer.model, processor, splits["test"], 24)))


def test_same_seed_same_numbers(tmp_path):
    (log, metrics), (log_again, metrics_again), (other, _) = (short_path(tmp_path / str(k), seed)
                                                              for k, seed in enumerate((0, 0, 1)))
    pd.testing.assert_frame_equal(log, log_again)
    assert metrics == metrics_again
    assert not log.equals(other)


def test_sft_moves_lora_and_nothing_else(tmp_path):
    start(0)
    splits, _ = load_data("scenes", SMALL, 0)
    model, processor = load_vlm("tiny")
    trainer = sft_trainer(model, processor,
                          synthesise(splits["train"], codec_of(model.config.model_type, processor))[0], SMALL,
                          0, tmp_path, disable_tqdm=True)
    before = {n: p.detach().clone() for n, p in trainer.model.named_parameters()}
    trainer.train()
    for name, weight in trainer.model.named_parameters():
        assert before[name].equal(weight) == ("lora_" not in name), name


def test_grpo_moves_lora_and_nothing_else_when_a_group_has_something_to_say(tmp_path):
    start(0)
    splits, _ = load_data("scenes", SMALL, 0)
    model, processor = load_vlm("tiny")
    trainer = grpo_trainer(model, processor, grpo_rows(splits["train"]),
                           codec_of(model.config.model_type, processor), SMALL, 0, tmp_path,
                           disable_tqdm=True)
    # every rollout differs
    trainer.reward_funcs[0] = lambda completions, **columns: [float(k) for k in range(len(completions))]
    before = fingerprints(trainer.model)
    trainer.train()
    after = fingerprints(trainer.model)
    assert before["frozen"] == after["frozen"] and before["trained"] != after["trained"]


def test_the_weight_refuses_a_kl_term_that_it_would_not_reach():
    with pytest.raises(ValueError, match="leaves a KL term"):
        SpatialGRPOConfig(output_dir="x", beta=0.04, use_cpu=True, bf16=False)
    assert SpatialGRPOConfig(output_dir="x", beta=0.04, consistency=False, use_cpu=True,
                             bf16=False).beta == 0.04


def test_grpo_asks_where_there_is_a_rival():
    ship, tank = (dict(category=c, colour="red", box=[0, 0, 1, 1]) for c in ("ship", "tank"))
    rows = to_dataset([dict(expression=str(k), category="ship", objects=things) for k, things in enumerate(
        ([ship, ship], [ship, tank, tank], [ship], None, [tank, ship, ship]))])
    assert with_rivals(rows)["expression"][:] == ["0", "4"]
    assert with_rivals(rows, least=2)["expression"][:] == ["0", "4"] and len(with_rivals(rows, least=3)) == 5
    assert len(with_rivals(rows.select([2, 3]))) == 2  # nothing left: all are kept


def leave_mark(folder):
    Path(folder, os.environ.get("RANK", "alone")).write_text(os.environ.get("WORLD_SIZE", "1"))


def fail(folder): raise OSError("no room left")


def test_work_is_done_here_or_by_several_processes(tmp_path):
    for count, marks in ((1, {"alone": "1"}), (2, {"0": "2", "1": "2"})):
        folder = tmp_path / str(count)
        folder.mkdir()
        on_processes(count, leave_mark, folder)
        assert {p.name: p.read_text() for p in folder.iterdir()} == marks


def test_a_process_that_fails_is_not_passed_over(tmp_path):
    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(RuntimeError, match="process . of 2: OSError: no room left"):
        on_processes(2, fail, tmp_path)
    assert signal.getsignal(signal.SIGINT) is before  # else Ctrl-C would not be Ctrl-C any more


@pytest.mark.parametrize("module, stage", [("sft", "sft"), ("train", "grpo")])
def test_in_a_notebook_other_processes_get_the_function_of_the_module(module, stage, tmp_path):
    """What a notebook defines belongs to `__main__`, where a started process does not find it."""
    page = {"__name__": "__main__"}
    for cell in nbformat.read(ROOT / "nbs" / "reference" / "steps.ipynb", 4).cells:
        if cell.source.startswith("#| export"): exec(cell.source, page)
    given, run = [], page["Run"](tmp_path, "scenes",
                                 replace(get_scale("workshop"), num_train=4, num_val=2, num_test=2), 0)
    assert type(run).__module__ == "__main__"
    page |= dict(on_processes=lambda count, work, *rest: given.append(
        (count, pickle.loads(pickle.dumps((work, *rest))))))
    getattr(run, stage)
    count, (work, rows, start, size, seed, folder) = given[-1]
    assert (work.__module__ == f"rsground_nb.{module}" and work.__name__ == f"train_{stage}"
            and count == size.processes > 1)
    assert (rows[:] == run.rows["train"][:] and folder == tmp_path / stage
            and start == (run.chains if stage == "sft" else run.sft))


def test_a_step_is_made_once_and_asks_for_what_it_needs(tmp_path, monkeypatch):
    order = []
    monkeypatch.setattr(rsground_nb.steps, "on_processes",
                        lambda count, work, rows, start, size, seed, folder: order.append((folder.name,
                                                                                           start)))
    for _ in range(2):
        run = Run(tmp_path, "scenes", SMALL)
        assert (run.grpo, run.sft) == (tmp_path / "grpo" / "model", tmp_path / "sft" / "model")
    assert order == [("sft", tmp_path / "chains"), ("grpo", tmp_path / "sft" / "model")]
    for other in (Run(tmp_path, "scenes", SMALL, 1), Run(tmp_path, "elsewhere", SMALL),
                  Run(tmp_path, "scenes", replace(SMALL, grpo_steps=3))):
        with pytest.raises(ValueError, match="holds another run"): other.grpo


def test_a_step_that_fails_is_not_finished_and_keeps_its_checkpoints(tmp_path):
    def stop(folder):
        (folder / "trainer").mkdir()
        raise RuntimeError("stopped")
    with pytest.raises(RuntimeError, match="stopped"): Run(tmp_path).made("sft", stop)
    assert not (tmp_path / "sft" / "made_by.json").exists() and (tmp_path / "sft" / "trainer").is_dir()
    Run(tmp_path).made("sft", lambda folder: None)
    assert (tmp_path / "sft" / "made_by.json").exists() and not (tmp_path / "sft" / "trainer").exists()


def test_two_processes_do_not_make_the_same_step(tmp_path):
    program = f"from rsground_nb.steps import Run; Run({str(tmp_path)!r}).made('sft', print)"
    def second(folder):
        said.append(subprocess.run([sys.executable, "-c", program], capture_output=True, text=True).stderr)
    said = []
    Run(tmp_path).made("sft", second)
    assert "is in use by another process: wait until it ends" in said[0]
