"""Kill trainings again and again with SIGKILL, at moments drawn from a seed, and compare what they end with
to one that nobody killed. Writes kill_training.csv.

    python tests/kill_training.py [--kills 20] [--seed 0]

A line of the table is one start of a stage. `signal` is what was killed: the whole process group, the
starting process alone, or nothing (the start reached the end). One start in five is killed in its first eight
seconds, which may be before it trains; the others up to half a second after a step drawn from the next third
of the training has been kept. `seconds` count from the start of the process; `kept` is the last whole
checkpoint at the kill, `broken` says that another one was being written; `resumed_from` is the step that the
start went on from, 0 if it began from the beginning or was killed before it came to train. At the end of a
training `equal_weights` and `columns_differ` compare it with the uninterrupted one: model, adapter and
weights.csv byte by byte, log.csv column by column, times left out.
"""
import argparse
import multiprocessing
import os
import random
import re
import shutil
import signal
import tempfile
import time
from dataclasses import replace
from pathlib import Path

import pandas as pd
import psutil

from rsground_nb.safeguard import last_checkpoint
from rsground_nb.scale import SCALES, get_scale
from rsground_nb.steps import Run
from rsground_nb.train import silent

TABLE = Path(__file__).with_suffix(".csv")
SMOKE = replace(get_scale("smoke"), lora_rank=64, sft_from=None, sft_learning_rate=8e-3,
                grpo_learning_rate=5e-4)
SHORT = dict(num_train=64, num_val=2, num_test=8)
# of 64 scenes 26 have a rival: 12 steps of 4 questions begin GRPO's second epoch; SFT sees 64 chains,
# 40 steps of 4 begin the third
SCALES.update({s.name: s for s in (
    replace(SMOKE, name="sft-lora", **SHORT, sft_steps=40, sft_batch_size=4),
    replace(SMOKE, name="sft-all", **SHORT, sft_steps=40, sft_batch_size=4, sft_learning_rate=2e-3,
            lora_rank=0),
    replace(SMOKE, name="grpo-lora", **SHORT, num_generations=4, max_completion_length=96),
    replace(SMOKE, name="grpo-all-2", **SHORT, num_generations=4, max_completion_length=96,
            sft_learning_rate=2e-3, grpo_learning_rate=2e-4, lora_rank=0, processes=2))})
TIMES = {"minutes", "step_time"}


def differences(one, other):
    """(equal weights?, columns of the log that differ) of two finished stages."""
    files = [p.relative_to(one) for p in [*one.glob("*/*.safetensors"), one / "weights.csv"]]
    a, b = (pd.read_csv(folder / "log.csv") for folder in (one, other))
    return all((one / f).read_bytes() == (other / f).read_bytes()
               for f in files), [c for c in a.columns.union(b.columns) if c not in a or c not in b
                                 or c not in TIMES and not a[c].equals(b[c])]


def work(name, out, words):
    """A stage, in a process group of its own; what it says goes to a file."""
    os.setsid()
    with open(words, "w") as file:
        for number in (1, 2): os.dup2(file.fileno(), number)
    getattr(Run(out, "scenes", name), name.split("-")[0])


class Start:
    """A process that calls a stage. It comes out of a server that has the imports behind it,
    so that a kill costs seconds."""
    server = multiprocessing.get_context("forkserver")
    server.set_forkserver_preload(["rsground_nb.steps"])

    def __init__(self, name, out, work=work, words="words.txt", more=()):
        self.out, self.stage, self.file, self.began = (Path(out), name.split("-")[0], Path(out) / words,
                                                       time.time())
        self.process = self.server.Process(target=work, args=(name, self.out, self.file, *more))
        self.process.start()

    def kill(self, alone=False):
        """SIGKILL. Returns when every process of the group is gone."""
        if alone: self.process.kill()
        else: os.killpg(self.process.pid, signal.SIGKILL)
        self.process.join()
        while group_of(self.process.pid): time.sleep(0.1)

    def state(self):
        work = self.out / self.stage / "trainer"
        kept = last_checkpoint(work)
        return dict(kept=step_of(kept),
                    broken=any(not (p / "whole.json").exists() for p in work.glob("checkpoint-*")))

    def words(self): return self.file.read_text()

    def resumed_from(self):
        found = re.search(r"continues after step (\d+)", self.words())
        return int(found[1]) if found else 0


def group_of(leader):
    """The live processes of a process group."""
    live = []
    for process in psutil.process_iter():
        try:
            if os.getpgid(process.pid) == leader and process.status() != psutil.STATUS_ZOMBIE:
                live.append(process)
        except (ProcessLookupError, psutil.NoSuchProcess): pass
    return live


def step_of(checkpoint): return int(checkpoint.name.split("-")[1]) if checkpoint else 0


def kill_often(name, kills, draw, root):
    """Start, kill, start again until the stage is done; and again, until there were enough kills."""
    stage, whole, rows, done, training = name.split("-")[0], root / name / "uninterrupted", [], 0, 0
    whole.mkdir(parents=True)
    if stage == "grpo": Run(whole, "scenes", name).sft
    start = Start(name, whole)
    start.process.join()
    assert start.process.exitcode == 0, start.words()
    if stage == "grpo":
        assert not silent(pd.read_csv(whole / "grpo" / "log.csv")), (
            "no two rollouts of a question differed: nothing was trained")
    while done < kills or rows[-1]["signal"] != "none":
        if not rows or rows[-1]["signal"] == "none":
            training += 1
            out = root / name / str(training)
            shutil.copytree(whole, out, ignore=lambda folder, names: [n for n in names if folder == str(whole)
                                                                      and n == stage])
        start = Start(name, out)
        steps, kept = getattr(get_scale(name), f"{stage}_steps"), start.state()["kept"]
        step = 0 if draw.random() < 0.2 else draw.randint(kept + 1, kept + steps // 3)
        rest = draw.uniform(0, 0.5 if step else 8)
        while done < kills and start.process.is_alive() and start.state()["kept"] < step: time.sleep(0.002)
        start.process.join(rest if done < kills else None)
        if start.process.is_alive():
            alone, seconds = get_scale(name).processes > 1 and done % 4 == 3, time.time() - start.began
            start.kill(alone)
            done += 1
            row = dict(kill=done, signal="starter" if alone else "group", seconds=round(seconds, 2),
                       **start.state())
        else:
            assert start.process.exitcode == 0, start.words()
            equal, columns = differences(whole / stage, out / stage)
            row = dict(signal="none", equal_weights=equal, columns_differ=" ".join(columns))
        rows.append(dict(stage=name, processes=get_scale(name).processes, training=training,
                         resumed_from=start.resumed_from(), **row))
        print(rows[-1], flush=True)
    return rows


def main():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=20,
                        help="of SFT, of GRPO in one process, and of GRPO in two")
    parser.add_argument("--seed", type=int, default=0, help="of the moments")
    options = parser.parse_args()
    draw, rows = random.Random(options.seed), []
    with tempfile.TemporaryDirectory() as root:
        for name, kills in {"sft-lora": options.kills // 2, "sft-all": options.kills - options.kills // 2,
                            "grpo-lora": options.kills, "grpo-all-2": options.kills}.items():
            rows += kill_often(name, kills, draw, Path(root))
            order = ["stage", "processes", "training", "kill", "signal", "seconds", "kept", "broken",
                     "resumed_from", "equal_weights", "columns_differ"]
            pd.DataFrame(rows)[order].astype({"kill": "Int64", "kept": "Int64"}).to_csv(TABLE, index=False)


if __name__ == "__main__": main()
