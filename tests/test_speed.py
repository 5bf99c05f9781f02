"""What makes a training step faster changes neither loss nor gradient."""
import subprocess
import sys
from dataclasses import replace
from types import SimpleNamespace

import pandas as pd
import pytest
import torch
import trl.trainer.utils as trl_utils
from safetensors.torch import load_file
from trl import SFTTrainer

from rsground_nb.data import load_data
from rsground_nb.model import codec_of, load_vlm
from rsground_nb.safeguard import on_processes
from rsground_nb.scale import get_scale, keep_memory, start
from rsground_nb.sft import AnswersTrainer, sft_trainer, train_sft
from rsground_nb.synthesis import load_chains, make_chains

SMALL = replace(get_scale("smoke"), num_train=16, num_val=2, num_test=2, sft_from=None, sft_steps=3,
                sft_batch_size=4, sft_learning_rate=8e-3, rows_per_pass=4)


@pytest.fixture(scope="module")
def chains(tmp_path_factory):
    """Folder of chains for SMALL."""
    folder = tmp_path_factory.mktemp("chains")
    _, processor = load_vlm("tiny")
    make_chains(load_data("scenes", SMALL, 0)[0]["train"], codec_of("qwen3_vl", processor), folder, seed=0)
    return folder


def trainer_of(chains, folder, rank=0, **settings):
    start(0)
    model, processor = load_vlm("tiny")
    rows = load_chains(chains, load_data("scenes", SMALL, 0)[0]["train"], codec_of("qwen3_vl", processor))
    return sft_trainer(model, processor, rows, replace(SMALL, lora_rank=rank), 0, folder, disable_tqdm=True,
                       **settings)


def one_pass(trainer, batch, **how):
    """(loss, gradients by name, logged numbers) of one batch."""
    trainer.model.train().zero_grad()
    loss = trainer.compute_loss(trainer.model, dict(batch), **how)
    loss.backward()
    logged = {name: trainer._metrics["train"][name][-1] for name in ("entropy", "mean_token_accuracy")}
    return (loss.detach(), {n: p.grad for n, p in trainer.model.named_parameters() if p.grad is not None},
            logged)


@pytest.mark.parametrize("rank, how", [(0, {}), (8, {}), (0, dict(num_items_in_batch=1000))], ids=str)
def test_head_on_scored_places_gives_the_same_loss_and_gradient(rank, how, chains, tmp_path, monkeypatch):
    trainer = trainer_of(chains, tmp_path, rank)
    for name, weight in trainer.model.named_parameters():
        if "lora_B" in name: torch.nn.init.normal_(weight, std=0.05)
    batch = next(iter(trainer.get_train_dataloader()))
    loss, gradient, logged = one_pass(trainer, batch, **how)
    monkeypatch.setattr(AnswersTrainer, "compute_loss", SFTTrainer.compute_loss)
    usual, usual_gradient, usual_logged = one_pass(trainer, batch, **how)
    torch.testing.assert_close(loss, usual, atol=1e-6, rtol=1e-6)
    assert gradient.keys() == usual_gradient.keys() and len(gradient) > 20
    for name, one in gradient.items():
        assert (one - usual_gradient[name]).norm() <= 1e-6 * max(usual_gradient[name].norm(), 1), name
    assert logged == pytest.approx(usual_logged, abs=1e-6)


def test_the_head_sees_the_scored_places_only(chains, tmp_path, monkeypatch):
    seen = []
    head = trl_utils._ChunkedLogProbFunction
    def counted(states, *rest):
        seen.append(len(states))
        return head.apply(states, *rest)
    monkeypatch.setattr(trl_utils, "_ChunkedLogProbFunction", SimpleNamespace(apply=counted))
    trainer = trainer_of(chains, tmp_path)
    batch = next(iter(trainer.get_train_dataloader()))
    trainer.compute_loss(trainer.model, dict(batch))
    assert seen == [int((batch["labels"] != -100).sum())] and seen[0] < 0.7 * batch["labels"].numel()


def test_two_processes_give_the_sft_weights_of_one(chains, tmp_path):
    """Rows of different length: without TRL's division by the tokens of the whole
    step the weights would differ."""
    for count in (1, 2):
        folder = tmp_path / str(count)
        (folder / "trainer").mkdir(parents=True)
        on_processes(count, train_sft, load_data("scenes", SMALL, 0)[0]["train"], chains,
                     replace(SMALL, lora_rank=0, processes=count), 0, folder)
    one, two = (load_file(tmp_path / count / "model" / "model.safetensors") for count in "12")
    logs = [pd.read_csv(tmp_path / count / "log.csv") for count in "12"]
    assert one.keys() == two.keys() and all(torch.allclose(one[n], two[n], atol=2e-5) for n in one)
    pd.testing.assert_frame_equal(*(log[["step", "loss", "grad_norm", "num_tokens"]] for log in logs),
                                  rtol=1e-4)
    before = load_vlm("tiny")[0].state_dict()
    assert max((one[n] - before[n]).abs().max() for n in one) > 1e-3


STEPS = """
import ctypes, resource, sys
from rsground_nb.scale import keep_memory

if sys.argv[1] == "keep": keep_memory()
libc, size = ctypes.CDLL(None), 20 << 20
libc.malloc.restype, libc.malloc.argtypes = ctypes.c_void_p, [ctypes.c_size_t]
libc.free.argtypes = [ctypes.c_void_p]
libc.memset.argtypes = [ctypes.c_void_p, ctypes.c_int, ctypes.c_size_t]
def step():
    blocks = [libc.malloc(size) for _ in range(4)]
    for block in blocks: libc.memset(block, 1, size)
    for block in blocks: libc.free(block)
for _ in range(3): step()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(5): step()
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="glibc's allocator")
def test_freed_memory_is_kept_for_the_next_step():
    """Pages that the system hands out anew while the same four blocks of 20 MiB are asked for five times."""
    usual, kept = (int(subprocess.check_output([sys.executable, "-c", STEPS, way]))
                   for way in ("usual", "keep"))
    assert kept < usual / 4


def test_kept_memory_changes_no_bit(chains, tmp_path):
    trainer = trainer_of(chains, tmp_path)
    batch = next(iter(trainer.get_train_dataloader()))
    loss, gradient, _ = one_pass(trainer, batch)
    gradient = {name: one.clone() for name, one in gradient.items()}
    keep_memory()
    again, same, _ = one_pass(trainer, batch)
    assert loss.equal(again) and all(gradient[name].equal(same[name]) for name in gradient)


def test_another_c_library_is_left_alone(monkeypatch):
    monkeypatch.setattr("ctypes.CDLL", lambda name: object())  # without mallopt, as musl
    keep_memory()
