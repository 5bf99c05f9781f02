"""Trainings that are killed, interrupted or run into trouble go on from their last whole checkpoint and end
with the same bits. The long count: kill_training.py and its table."""
import errno
import math
import os
import random
import socket
import time
from dataclasses import replace
from types import SimpleNamespace

import pandas as pd
import pytest
import torch

import rsground_nb.train
from kill_training import Start, differences
from rsground_nb.data import load_data
from rsground_nb.model import codec_of, load_vlm
from rsground_nb.safeguard import Safeguard, checkpoints, last_checkpoint, train_and_save
from rsground_nb.scale import get_scale, start
from rsground_nb.sft import sft_trainer
from rsground_nb.steps import Run, check_folder
from rsground_nb.synthesis import synthesise
from rsground_nb.train import train_grpo, watched

SIZE = replace(get_scale("smoke"), num_train=24, num_val=2, num_test=2, lora_rank=8, sft_from=None,
               sft_steps=8, sft_batch_size=4, sft_learning_rate=8e-3, grpo_steps=7, grpo_learning_rate=5e-4,
               prompts_per_step=2, num_generations=4, temperature=2.0, max_completion_length=12,
               rows_per_pass=4)


# twelve tokens are no answer: count its letters
def iou_reward(completions, **columns):
    return [len(set(answer[0]["content"])) / 160 for answer in completions]


def train(stage, folder, size=SIZE, seed=0, reward=iou_reward):
    """A short training of a stage, without the stages before it. An epoch is six steps."""
    rows = load_data("scenes", size, 0)[0]["train"]
    if stage == "grpo":
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(rsground_nb.train, "make_rewards", lambda codec: [reward])
            patch.setattr(rsground_nb.train, "REWARD_WEIGHTS", [1.0])
            return train_grpo(rows, "tiny", size, seed, folder)
    start(seed)
    model, processor = load_vlm("tiny")
    chains, _ = synthesise(rows, codec_of(model.config.model_type, processor))
    train_and_save(sft_trainer(model, processor, chains, size, seed, folder / "trainer",
                               **checkpoints(size.sft_steps)), processor, folder, seed=seed)


def work(name, folder, words, rank=0, port=None):
    """The same in a process of its own."""
    os.setsid()
    with open(words, "w") as file:
        for number in (1, 2): os.dup2(file.fileno(), number)
    size = SIZE
    if port:
        os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE="2", MASTER_ADDR="localhost",
                          MASTER_PORT=str(port))
        size = replace(SIZE, lora_rank=0, processes=2)
    train(name, folder / name, size)


class Pair:
    """Two processes that train together."""
    def __init__(self, name, out):
        with socket.socket() as free:
            free.bind(("localhost", 0))
            port = free.getsockname()[1]
        self.starts = [Start(name, out, words=f"words{rank}.txt", work=work, more=(rank, port))
                       for rank in range(2)]
    def kept(self): return self.starts[0].state()["kept"]
    def alive(self): return all(s.process.is_alive() for s in self.starts)
    def kill(self):
        for one in self.starts: one.kill()
    def wait(self):
        for one in self.starts:
            one.process.join()
            assert one.process.exitcode == 0, one.words()
    def resumed_from(self): return self.starts[0].resumed_from()


class Single(Pair):
    def __init__(self, name, out): self.starts = [Start(name, out, work=work)]


def folder_of(tmp, name, stage):
    folder = tmp / name / stage
    folder.mkdir(parents=True, exist_ok=True)
    return folder


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """The uninterrupted trainings, in this process."""
    out = tmp_path_factory.mktemp("whole")
    for stage in ("sft", "grpo"): train(stage, folder_of(out, "", stage))
    assert pd.read_csv(out / "grpo" / "log.csv").frac_reward_zero_std.mean() < 0.5
    return out


@pytest.mark.parametrize("stage, kills, kind",
                         [("sft", (2, 6), Single), ("grpo", (2, 5), Single), ("grpo", (3,), Pair)])
def test_killed_trainings_end_with_the_same_bits(tmp_path, whole, stage, kills, kind):
    """SFT's seventh step is the first of its second epoch, as is GRPO's."""
    draw, out = random.Random(0), tmp_path / "killed"
    folder_of(tmp_path, "killed", stage)
    if kind is Pair:
        whole = tmp_path / "whole"
        folder_of(tmp_path, "whole", stage)
        kind(stage, whole).wait()
    reached = 0
    for step in kills:
        running = kind(stage, out)
        while running.alive() and running.kept() < step: time.sleep(0.002)
        time.sleep(draw.uniform(0, 0.1))
        running.kill()
        assert running.resumed_from() == reached
        reached = running.kept()
        assert reached >= step
    running = kind(stage, out)
    running.wait()
    assert running.resumed_from() == reached
    assert differences(whole / stage, out / stage) == (True, [])


class Trouble(Exception): pass


def stop_at(step, what, monkeypatch):
    """Once, let `what()` happen when so many steps are done."""
    def begin(self, args, state, control, **kwargs):
        if state.global_step == step:
            monkeypatch.delattr(Safeguard, "on_step_begin")
            what(state, args)
    monkeypatch.setattr(Safeguard, "on_step_begin", begin, raising=False)


def resumes_to_the_same(stage, folder, whole, capsys, step):
    capsys.readouterr()
    train(stage, folder)
    assert f"{stage}: continues after step {step} of" in capsys.readouterr().out
    assert differences(whole / stage, folder) == (True, [])


def test_ctrl_c(tmp_path, whole, capsys, monkeypatch):
    def press(state, args): raise KeyboardInterrupt
    stop_at(3, press, monkeypatch)
    folder = folder_of(tmp_path, "", "sft")
    with pytest.raises(KeyboardInterrupt): train("sft", folder)
    assert ("sft stopped after step 3 of 8: KeyboardInterrupt" in (said := capsys.readouterr().out)
            and "Step 3 is kept in" in said and "--resume" in said)
    resumes_to_the_same("sft", folder, whole, capsys, 3)


def test_a_checkpoint_that_was_not_written_to_its_end_is_not_used(tmp_path, whole, capsys, monkeypatch):
    """The worst moment: everything that transformers writes is there, the next process's part may not be."""
    real = Safeguard.on_save
    def save(self, args, state, control, **kwargs):
        if state.global_step == 4: raise Trouble
        real(self, args, state, control, **kwargs)
    folder = folder_of(tmp_path, "", "sft")
    with monkeypatch.context() as patch:
        patch.setattr(Safeguard, "on_save", save)
        with pytest.raises(RuntimeError, match="Step 3 is kept"): train("sft", folder)
    assert ((folder / "trainer" / "checkpoint-4" / "trainer_state.json").exists()
            and last_checkpoint(folder / "trainer").name == "checkpoint-3")
    (folder / "trainer" / "checkpoint-4" / "optimizer.pt").write_bytes(b"half")
    resumes_to_the_same("sft", folder, whole, capsys, 3)


@pytest.mark.skipif(not os.path.exists("/dev/full"),
                    reason="no /dev/full, the file on which every write finds the disk full")
def test_a_full_disk(tmp_path, whole, capsys, monkeypatch):
    def fill(state, args):
        folder = tmp_path / "sft" / "trainer" / "checkpoint-6"
        folder.mkdir()
        (folder / "optimizer.pt").symlink_to("/dev/full")
    stop_at(5, fill, monkeypatch)
    folder = folder_of(tmp_path, "", "sft")
    with monkeypatch.context() as patch:
        # /dev/full is full, the disk beside it is not
        patch.setattr("shutil.disk_usage", lambda path: SimpleNamespace(free=0))
        with pytest.raises(RuntimeError, match="sft stopped after step 6 of 8: .*The disk is full. Step 5 is "
                           "kept in .* where 0 MB are free"):
            train("sft", folder)
    resumes_to_the_same("sft", folder, whole, capsys, 5)


def test_a_folder_that_cannot_be_written_to(tmp_path):
    """A file stands where the folder should be: that stops root too."""
    for stage in ("sft", "grpo"):
        (tmp_path / stage).write_text("")
        with pytest.raises(ValueError,
                           match=f"a step cannot write to .*{stage} .*: repair or remove what is there"):
            getattr(Run(tmp_path), stage)
        (tmp_path / stage).unlink()
        (tmp_path / stage).mkdir()
        (tmp_path / stage / "trainer").write_text("")
        with pytest.raises(ValueError, match=f"a step cannot write to .*{stage}.trainer .*: repair or "
                           "remove what is there"):
            getattr(Run(tmp_path), stage)
    def full(*args, **kwargs): raise OSError(errno.EROFS, os.strerror(errno.EROFS))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("tempfile.TemporaryFile", full)
        with pytest.raises(ValueError, match="Read-only file system"): check_folder(tmp_path / "other")


@pytest.mark.parametrize("step, value, said", [
    (1, math.nan, "ValueError: the reward function iou_reward gave nan for"), (1, math.inf, "gave inf for"),
    (6, None, "RuntimeError: the reward function iou_reward failed: ZeroDivisionError: division by zero")])
def test_a_reward_that_goes_wrong(tmp_path, whole, capsys, step, value, said):
    """After six steps the second epoch begins."""
    def reward(completions, trainer_state, **columns):
        if trainer_state.global_step == step: return [value or 1 / 0] * len(completions)
        return iou_reward(completions)
    reward.__name__ = "iou_reward"
    folder = folder_of(tmp_path, "", "grpo")
    with pytest.raises(RuntimeError,
                       match=f"grpo stopped after step {step} of 7: .*{said}.*Step {step} is kept in"):
        train("grpo", folder, reward=reward)
    if value is None: resumes_to_the_same("grpo", folder, whole, capsys, step)


def test_none_is_no_number_and_no_trouble():
    assert watched(lambda completions, **columns: [None, 1.0])(["a", "b"]) == [None, 1.0]


def test_weights_are_not_spoiled_by_a_gradient_that_is_not_finite(tmp_path, whole, capsys, monkeypatch):
    def poison(model, args, out):
        return (out[0] * math.nan, *out[1:]) if isinstance(out, tuple) else out * math.nan
    def hook(state, args):
        next(m for m in kept["model"].modules() if isinstance(m, torch.nn.LayerNorm)
             or "Norm" in type(m).__name__).register_forward_hook(poison)
    kept = {}
    begin = Safeguard.on_pre_optimizer_step
    def look(self, args, state, control, model=None, **kwargs):
        kept["model"] = model
        begin(self, args, state, control, model=model, **kwargs)
    monkeypatch.setattr(Safeguard, "on_pre_optimizer_step", look)
    stop_at(3, hook, monkeypatch)
    folder = folder_of(tmp_path, "", "sft")
    with pytest.raises(RuntimeError, match="sft stopped after step 3 of 8: FloatingPointError: the gradient "
                       "is not finite.*Step 3 is kept"):
        train("sft", folder)
    assert all(p.isfinite().all() for p in kept["model"].parameters())
    resumes_to_the_same("sft", folder, whole, capsys, 3)


def test_checkpoints_of_another_training_are_not_taken_over(tmp_path, monkeypatch):
    def press(state, args): raise Trouble
    stop_at(3, press, monkeypatch)
    folder = folder_of(tmp_path, "", "sft")
    with pytest.raises(RuntimeError, match="Trouble"): train("sft", folder)
    with pytest.raises(ValueError, match="trainer holds another run .*seed=0.*seed=1"):
        train("sft", folder, seed=1)
