"""Which parts of the second system pay? Trains each arm with several seeds and scores all of them on the same
held-out drawn questions. Writes benchmark_segment.csv (scores, a row for each set and arm, over all seeds),
benchmark_segment_effects.csv (the whole system against each arm) and benchmark_segment_seeds.csv.

    python tests/benchmark_segment.py OUT [--seeds 0 1 2 3 4] [--share 0.5] [--scenes 6000] [--questions 512]
                                         [--arms ARM ...] [--write FOLDER]
    python tests/benchmark_segment.py OUT --smoke        a minute, to see that it runs

Arms ("whole" must be among them): whole, no SCR, no dense prompt, no sparse prompts, no cues; one stage
(patches straight to a mask; it starts from the whole system's first stage and trains for as long as the other
two take); and with the whole system's SAM: the box of the shipped GRPO model as prompt, the true box, the
largest object. Arms that differ from the whole system only in the last stage start from its first two.

Sets and drift: `deeper/drift`. `outside` and `wrong` are the drift of the answered mask, `response_outside`
and `response_wrong` that of the response map. Missed: an IoU below 0.1. Size: thirds of a set by the area of
the target; crowding: up to 3 objects, more.

`--share` is the share of the shipped segmenter's steps that every stage of every arm is trained for;
with 1, the tables are named benchmark_segment_full.csv and so on.

A finished arm is neither trained nor scored again, and an interrupted training continues.
"""
import argparse
import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import torch
import torch.nn.functional as F

from rsground_nb.ablation import effect
from rsground_nb.align import coverage, read_texts, response_loss, structure_loss
from rsground_nb.drift import SETS, drift
from rsground_nb.evaluate import interval, largest_object, predict
from rsground_nb.folders import to_dataset
from rsground_nb.masks import make_segmenter, mask_loss, to_picture
from rsground_nb.model import load_tiny
from rsground_nb.pretrain import run_steps
from rsground_nb.scale import start
from rsground_nb.scenes import scene_records
from rsground_nb.segment import masks_for
from rsground_nb.segmentation import SMOKE, TINY, OneStage, Questions, drawn, segment_rows, train_segmenter
from rsground_nb.shapes import decode_mask

ARMS = {"whole": {}, "no SCR": dict(structure=0.0), "no dense prompt": dict(use=("sparse", "cues")),
        "no sparse prompts": dict(use=("dense", "cues")), "no cues": dict(use=("sparse", "dense"))}
ONE_STEPS, TEST_SEED = 350, 7
STEPS = "align_steps", "sam_steps", "ground_steps"
DRIFT = ("outside", "wrong", "response_outside", "response_wrong")


def arm_folder(out, seed, arm): return out / f"{seed}-{arm.replace(' ', '-')}"


def trained_arm(rows, size, seed, out, arm):
    """The model of an arm."""
    folder, whole = arm_folder(out, seed, arm), arm_folder(out, seed, "whole") / "trainer"
    work = folder / "trainer"
    if "structure" not in ARMS[arm] and arm != "whole" and not folder.exists():
        work.mkdir(parents=True)
        for name in ("align.pt", "sam.pt", "pretrain.csv"): shutil.copy(whole / name, work / name)
    model = train_segmenter(rows, replace(size, **ARMS[arm]), seed, folder)
    if arm != "whole": shutil.rmtree(work, ignore_errors=True)
    return model


def answers_of(model):
    """Its masks and responses."""
    @torch.no_grad()
    def answer(images, texts):
        read = read_texts(model.tools.tokenizer, texts)
        made = model.eval()(model.views(images), read, torch.arange(len(images)))
        return [to_picture(m, image) for m, image in zip(made.masks, images)], made.aligned.sentence
    return answer


def one_stage(rows, size, seed, out, steps):
    """Trains the baseline and returns its masks and responses."""
    whole, folder = make_segmenter(seed=seed), arm_folder(out, seed, "one stage")
    first = torch.load(arm_folder(out, seed, "whole") / "trainer" / "align.pt", weights_only=True)
    whole.load_state_dict(first["trained"])
    torch.manual_seed(seed)
    model, questions = OneStage(whole.aligner, whole.canvas, whole.tools), Questions(rows)
    folder.mkdir(parents=True, exist_ok=True)

    def loss_at(step):
        views, texts, picture, targets = drawn(whole, questions, size, np.random.default_rng([seed, 4, step]))
        aligned, logits = model(views.clip, texts, picture)
        loss = mask_loss(logits, targets) + response_loss(aligned.sentence, coverage(targets, 14))
        loss = loss + size.structure * structure_loss(aligned, texts)
        return loss, dict(loss=loss.item())

    run_steps("one", model, list(model.parameters()), loss_at, steps, folder, size.ground_rate,
              save_every=50)

    @torch.no_grad()
    def answer(images, texts):
        read = read_texts(whole.tools.tokenizer, texts)
        aligned, made = model.eval()(whole.views(images).clip, read, torch.arange(len(images)))
        return [to_picture(logits, image) for logits, image in zip(made, images)], aligned.sentence
    return answer


def with_boxes(model, boxes):
    """The masks that SAM draws for given boxes, one a row in order; no responses."""
    left = iter(boxes)
    return lambda images, texts: (masks_for(model, images, [next(left) for _ in images]), None)


def measured(answer, rows):
    """One row for each question: pixels shared and in the union, IoU, drift."""
    found = []
    for k in range(0, len(rows), 32):
        part = rows.select(range(k, min(k + 32, len(rows))))
        masks, maps = answer(part["image"][:], part["expression"][:])
        if maps is not None:
            size = part[0]["height"], part[0]["width"]
            maps = F.interpolate(maps.sigmoid()[:, None], size, mode="bilinear")[:, 0].numpy()
        for i, (row, mask) in enumerate(zip(part.remove_columns("image"), masks)):
            true = decode_mask(row["mask"])
            both, union = int((mask & true).sum()), int((mask | true).sum())
            others = [o["box"] for o in row["objects"] if o["box"] != row["box"]]
            shares = *drift(mask, true, others), *((np.nan,) * 2 if maps is None
                                                   else drift(maps[i], true, others))
            found.append(dict(image=row["image_id"], area=true.sum(), objects=len(row["objects"]), both=both,
                              union=union, iou=both / union, **dict(zip(DRIFT, shares))))
    return pd.DataFrame(found)


def summary(each):
    """Scores of one arm on one set; the seeds of a question are averaged before the interval is drawn."""
    question = each.groupby("question").mean(numeric_only=True)
    images = each.groupby("question").image.first()
    size = pd.qcut(question.area, 3, labels=["small", "medium", "large"])
    crowd = np.where(question.objects <= 3, "few", "many")
    low, high = interval(question.iou, images)
    row = dict(seeds=each.seed.nunique(), N=len(question), mIoU=question.iou.mean(), mIoU_low=low,
               mIoU_high=high, oIoU=each.both.sum() / each.union.sum())
    row |= {f"Pr@{t}": (each.iou >= t).mean() for t in (0.5, 0.6, 0.7, 0.8, 0.9)}
    row |= {**question.iou.groupby(size, observed=False).mean(), **question.iou.groupby(crowd).mean()}
    return row | {name: each[name].mean() for name in ("missed", "empty", *DRIFT)}


def change(arm, other, column):
    """The effect (chapter 11) on a column: an arm against another one with the same seeds. Questions without
    drift, because some seed's mask is empty, do not count."""
    scores = [each.pivot(index="seed", columns="question", values=column) for each in (arm, other)]
    kept = scores[0].notna().all() & scores[1].notna().all()
    found = effect(*(s.loc[:, kept] for s in scores), arm.groupby("question").image.first()[kept])
    return {name: value for name, value in found.items() if name.startswith("IoU")}


def changes(each, data):
    """Rows of the table of effects: by how much the whole system has a higher IoU than an arm, and less
    drift."""
    whole = data[(data.arm == "whole") & data.seed.isin(each.seed)]
    size = each.groupby("question").area.first()
    parts = {"": size.index, ", small third": size.index[size <= size.quantile(1 / 3)],
             ", large third": size.index[size >= size.quantile(2 / 3)]}
    found = [dict(on=f"IoU{name}", **change(*(d[d.question.isin(part)] for d in (whole, each)), "iou"))
             for name, part in parts.items()]
    drifts = ["missed", *(name for name in DRIFT if each[name].notna().any())]
    return found + [dict(on=name, **change(each, whole, name)) for name in drifts]


def write_tables(out, folder, name="benchmark_segment"):
    """The tables from the files of `score`. The whole system must have finished the seeds of every arm."""
    files = sorted((out / "scores").glob("*.csv"))
    data = pd.concat([pd.read_csv(f).assign(**dict(zip(("set", "seed", "arm"), f.stem.split("_"))))
                      for f in files])
    data = data.assign(missed=(data.iou < 0.1) * 1.0, empty=(data.both == 0) & (data.union == data.area))
    rows, seeds, effects = [], [], []
    for (scenes, arm), each in data.groupby(["set", "arm"], sort=False):
        rows.append(dict(set=scenes, arm=arm, **summary(each)))
        for seed, one in each.groupby("seed"):
            seeds.append(dict(set=scenes, arm=arm, seed=seed, N=len(one), mIoU=one.iou.mean()))
        if arm != "whole":
            effects += [dict(set=scenes, arm=arm, **row) for row in changes(each, data[data.set == scenes])]
    for end, table in (("", rows), ("_seeds", seeds), ("_effects", effects)):
        pd.DataFrame(table).round(4).to_csv(folder / f"{name}{end}.csv", index=False)


def boxes_of(tests, out, limit):
    """Set -> boxes of the shipped GRPO model (None: no box), kept in a file."""
    path = out / "boxes.json"
    if not path.exists():
        vlm = load_tiny("grpo")
        found = {name: [p["predicted"] for p in predict(*vlm, rows, limit, 64)]
                 for name, rows in tests.items()}
        path.write_text(json.dumps(found))
    return json.loads(path.read_text())


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("out", type=Path)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2, 3, 4])
    parser.add_argument("--share", type=float, default=0.5)
    for name, count in (("scenes", 6000), ("questions", 512)):
        parser.add_argument(f"--{name}", type=int, default=count)
    parser.add_argument("--arms", nargs="+", metavar="ARM", help="all, unless given")
    parser.add_argument("--write", type=Path, help="folder for the tables (OUT, unless given)")
    parser.add_argument("--smoke", action="store_true")
    args = parser.parse_args()
    size, steps, limit = (SMOKE, 4, 40) if args.smoke else (TINY, round(args.share * ONE_STEPS), 160)
    if args.smoke: args.seeds, args.scenes, args.questions = [0, 1], 12, 24
    else: size = replace(size, **{name: round(args.share * getattr(size, name)) for name in STEPS})
    start(0)
    (args.out / "scores").mkdir(parents=True, exist_ok=True)
    tests = {name: to_dataset(list(scene_records(args.questions, TEST_SEED, split="test", style=style)))
             for name, style in SETS.items()}
    vlm = boxes_of(tests, args.out, limit)

    def score(seed, arm, made):
        """`made(set)` gives what answers."""
        for name, rows in tests.items():
            path = args.out / "scores" / f"{name}_{seed}_{arm}.csv"
            if path.exists(): continue
            found = measured(made(name), rows)
            found.rename_axis("question").to_csv(path)
        write_tables(args.out, args.write or args.out, f"benchmark_segment{'_full' * (args.share == 1)}")

    chosen = args.arms or [*ARMS, "GRPO's box", "true box", "largest object", "one stage"]
    for seed in args.seeds:
        rows = segment_rows(args.scenes, seed)
        for arm in (a for a in ARMS if a in chosen):
            model = trained_arm(rows, size, seed, args.out, arm)
            score(seed, arm, lambda name: answers_of(model))
            if arm == "whole": sam = model
        boxes = {"GRPO's box": vlm, "true box": {name: rows["box"][:] for name, rows in tests.items()},
                 "largest object": {name: [p["predicted"] for p in largest_object(rows)]
                                    for name, rows in tests.items()}}
        for arm in (a for a in boxes if a in chosen):
            score(seed, arm, lambda name: with_boxes(sam, boxes[arm][name]))
        if "one stage" not in chosen: continue
        answer = one_stage(rows, size, seed, args.out, steps)
        score(seed, "one stage", lambda name: answer)


if __name__ == "__main__":
    main()
