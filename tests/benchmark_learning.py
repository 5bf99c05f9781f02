"""Does the tiny model learn, stage by stage? Greedy answers to held-out drawn scenes after pretraining,
CoT-SFT and GRPO, and the answers that need no model.

    python tests/benchmark_learning.py
        the shipped model and the answers without a model
    python tests/benchmark_learning.py RUN --grpo-seed 0 [--count 512]          and the trainings

RUN is the folder of a workshop run with seed 0 (`rsground run --scale workshop --out RUN`, or chapters 6 and
9; this script makes what is missing). CoT-SFT has seed 0; GRPO starts from it with
--grpo-seed (0 is the run's own). Rows of the stage and seed are replaced in
tests/benchmark_learning.csv, so five calls give five seeds; several may run at the same time. The gain
of GRPO over all seeds that are there stands in the row "all": the mean of the seeds' gains with a 95 %
t interval. After seeds 0, 1 and 2, --average judges these three together: row "0 to 2" has the gain
that each question has on average over them, with a bootstrap interval over questions; row "averaged" is
the model that has the mean of their weights. --other judges all that is there on other questions, since
settings were chosen by the first. Sets of questions:

names      "the red ship", two to six objects of 10 to 40 % of the side (what pretraining asks)
referring  words of position, size or relation, and at least one more object of the
same category (what it never asks)
other      like referring, drawn with another seed
photos     "the plane": windows of real pictures of test airports of `aerial_planes` with one plane, as
pretraining cuts them; where the shared data are present
mixed      the test split of the workshop data: all kinds of expressions, as in training; seed 0, other scenes
"""
import argparse
import fcntl
import tempfile
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from conftest import SHARED
from PIL import Image
from pycocotools.coco import COCO
from scipy.stats import sem, t

from rsground_nb.data import to_dataset
from rsground_nb.evaluate import gain, interval, predict, score, without_model
from rsground_nb.model import DIRECT, REASON, load_tiny, load_vlm
from rsground_nb.pretrain import cut_window, name_quiz
from rsground_nb.rewards import format_score
from rsground_nb.safeguard import on_processes
from rsground_nb.scale import get_scale, start
from rsground_nb.scenes import as_png, scene_records
from rsground_nb.steps import Run
from rsground_nb.train import train_grpo

TABLE = Path(__file__).parent / "benchmark_learning.csv"
HELD_OUT = 1000  # seed of all questions here; training uses 0, 1, 2


def referring(count, seed, split):
    """Rows with words of position, size or relation and a second object of the target's category."""
    found = []
    for row in scene_records(5 * count, seed, split=split, rules=("end", "cell", "size", "relation")):
        if sum(o["category"] == row["category"] for o in row["objects"]) > 1: found.append(row)
        if len(found) == count: return to_dataset(found)
    raise ValueError(f"only {len(found)} of {count} rows")


def names(count, seed):
    """Rows of `name_quiz`."""
    rows = [dict(image=r["image"], expression=r["expression"], box=list(r["box"]), width=112, height=112,
                 category=r["expression"].split()[-1], image_id=str(k), expression_id=str(k), source="name",
                 objects=r["things"]) for k, r in enumerate(name_quiz(count, seed))]
    return to_dataset(rows)


def photos(count, seed, split="test"):
    """Rows of random windows of real pictures that hold one plane; None where the shared data are missing."""
    folder = SHARED / "data" / "aerial_planes"
    if not folder.is_dir(): return None
    coco, rng, found = COCO(folder / split / "_annotations.coco.json"), np.random.default_rng([seed, 8]), []
    pictures = [p for k, p in sorted(coco.imgs.items()) if coco.imgToAnns[k]]
    while len(found) < count:
        picture = pictures[rng.integers(len(pictures))]
        boxes = np.array([[x, y, x + w, y + h]
                          for x, y, w, h in (a["bbox"] for a in coco.imgToAnns[picture["id"]])])
        image = Image.open(folder / split / picture["file_name"]).convert("RGB")
        cut = cut_window(rng, boxes, image.size)
        if cut is None or len(cut[1]) != 1: continue
        (x, y, side), (box,) = cut
        window = image.resize((112, 112), Image.BICUBIC, (x, y, x + side, y + side), reducing_gap=3)
        found.append(dict(image={"bytes": as_png(window), "path": None}, expression="the plane",
                          box=(box * 112).tolist(), width=112, height=112, category="plane",
                          image_id=picture["file_name"], expression_id=str(len(found)), source="photo"))
    return to_dataset(found)


def add_rows(rows, path=TABLE, keys=("set", "stage", "seed")):
    """Add rows to a table, one process at a time; they replace rows with the same keys."""
    with open(Path(tempfile.gettempdir()) / f"{path.name}.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        new, keys = pd.DataFrame(rows), list(keys)
        new["seed"] = new.seed.astype(str)
        if path.exists():
            new = pd.concat([pd.read_csv(path, dtype={"seed": str}), new]).drop_duplicates(keys, keep="last")
        new.sort_values(keys, kind="stable").round(6).to_csv(path, index=False)


def judged(question_set, stage, seed, found, before=None, **more):
    """One row of the table: metrics with intervals, and the gain over the stage
    before, paired by question."""
    hits = np.array([p["iou"] >= 0.5 for p in found], float)
    low, high = interval(hits, [p["image_id"] for p in found])
    row = dict(set=question_set, stage=stage, seed=seed, **score(found), acc_low=low, acc_high=high, **more)
    row["format"] = (np.mean([format_score(p["answer"]) for p in found]) if stage in ("CoT-SFT", "GRPO")
                     else np.nan)
    return row | (gain(found, before) if before else {})


def answers(folder, rows, template, tokens):
    model, processor = load_tiny() if folder == "tiny" else load_vlm(str(folder))
    return predict(model, processor, rows, tokens, 64, template=template)


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("run", type=Path, nargs="?")
    parser.add_argument("--grpo-seed", type=int, default=0)
    parser.add_argument("--average", action="store_true", help="no training: seeds 0, 1 and 2 together")
    parser.add_argument("--other", action="store_true",
                        help="no training: all seeds that are there, on other questions")
    parser.add_argument("--count", type=int, default=512)
    options = parser.parse_args()
    size, seed = get_scale("workshop"), options.grpo_seed
    start(0)
    rows, named = referring(options.count, HELD_OUT, "test"), names(options.count, HELD_OUT)
    base = answers("tiny", rows, DIRECT, 24)
    table = [judged("names", "base", 0, answers("tiny", named, DIRECT, 24)),
             judged("referring", "base", 0, base)]
    for name, test, train in (("names", named, names(2000, 0)),
                              ("referring", rows, referring(2000, 0, "train"))):
        table += [judged(name, stage, 0, found) for stage, found in without_model(train, test).items()]
    seen = photos(options.count, HELD_OUT)
    if seen: table.append(judged("photos", "base", 0, answers("tiny", seen, DIRECT, 24)))
    add_rows(table)
    if options.run and options.average: average_and_judge(options.run, size, rows)
    elif options.run and options.other:
        judge_on_others(options.run, size, referring(options.count, HELD_OUT + 1, "test"))
    elif options.run: train_and_judge(options.run, seed, size, rows, base)
    print(pd.read_csv(TABLE).to_string(index=False))


def train_and_judge(run, seed, size, rows, base):
    """CoT-SFT, then GRPO with a seed of its own, each judged against the stage before."""
    steps = Run(run, "scenes", size, 0)
    learned, sets = steps.sft, dict(referring=rows, mixed=steps.rows["test"])
    sft = {name: answers(learned, asked, REASON, size.max_completion_length) for name, asked in sets.items()}
    minutes = pd.read_csv(run / "sft" / "log.csv").minutes.iloc[0]
    add_rows([judged(name, "CoT-SFT", 0, found, base if name == "referring" else None, minutes=minutes)
              for name, found in sft.items()])
    folder = steps.grpo.parent if seed == 0 else run / f"grpo-seed-{seed}"
    if not (folder / "log.csv").exists() or not (folder / "model").exists():
        folder.mkdir(exist_ok=True)
        on_processes(size.processes, train_grpo, steps.rows["train"], learned, size, seed, folder)
    minutes = pd.read_csv(folder / "log.csv").minutes.iloc[0]
    add_rows([judged(name, "GRPO", seed, answers(folder / "model", asked, REASON, size.max_completion_length),
                     sft[name], minutes=minutes) for name, asked in sets.items()])
    for name in sets: over_seeds(name)


def judge_on_others(run, size, rows):
    """The same models on questions by which nothing was chosen."""
    found = {folder.name: answers(folder / "model", rows, REASON, size.max_completion_length)
             for folder in (run / "sft", run / "grpo", *sorted(run.glob("grpo-seed-*")))}
    add_rows([judged("other", "CoT-SFT", 0, found["sft"])]
             + [judged("other", "GRPO", name.rpartition("-")[2] if "-" in name else 0, after, found["sft"])
                for name, after in found.items() if name != "sft"])
    over_seeds("other")


def over_seeds(question_set):
    """The row "all": the mean of the seeds' gains with a t interval."""
    found = pd.read_csv(TABLE, dtype={"seed": str})
    found = found[(found.set == question_set) & (found.stage == "GRPO") & found.seed.str.isdigit()]
    if len(found) > 1:
        low, high = t.interval(0.95, len(found) - 1, found.gain.mean(), sem(found.gain))
        numbers = found.drop(columns=["set", "stage", "seed", "gain_low", "gain_high"]).mean()
        add_rows([dict(set=question_set, stage="GRPO", seed="all",
                       **numbers[["N", "Acc@0.5", "Acc@0.7", "mIoU", "unparsable", "format", "gain"]],
                       gain_low=low, gain_high=high)])


def average_and_judge(run, size, rows):
    """What three seeds have in common: their mean gain question by question, and the mean of their
    weights, in which chance shrinks."""
    before, *after = (load_vlm(str(run / folder / "model"))
                      for folder in ("sft", "grpo", "grpo-seed-1", "grpo-seed-2"))
    answer = lambda model: predict(*model, rows, size.max_completion_length, 64)
    sft, *found = map(answer, (before, *after))
    together = [dict(image_id=p[0]["image_id"], iou=np.mean([q["iou"] for q in p])) for p in zip(*found)]
    weights = [torch.nn.utils.parameters_to_vector(model.parameters()).detach()
               for model, _ in (before, *after)]
    ways = torch.stack(weights[1:]) - weights[0]
    cosines = torch.nn.functional.cosine_similarity(ways[:, None], ways[None], dim=-1)
    print("cosines between the ways of the seeds:", cosines[0, 1].item(), cosines[0, 2].item(),
          cosines[1, 2].item())
    torch.nn.utils.vector_to_parameters(torch.stack(weights[1:]).mean(0), after[0][0].parameters())
    add_rows([dict(set="referring", stage="GRPO", seed="0 to 2", N=len(rows),
                   mIoU=np.mean([p["iou"] for p in together]), **gain(together, sft)),
              judged("referring", "GRPO", "averaged", answer(after[0]), sft)])


if __name__ == "__main__": main()
