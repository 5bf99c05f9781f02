"""Which parts of the second system pay? Trains each arm and scores all on the same held-out drawn questions.
Writes tests/benchmark_segment.csv (one row an arm and seed).

    python tests/benchmark_segment.py OUT [--seeds 5] [--scenes 6000] [--questions 512]

Arms: whole, no SCR, no dense prompt, no sparse prompts, no cues, one stage (patches straight to a mask), and
on the whole system's SAM: the box of the shipped GRPO model as prompt, the true box, the largest object. A
finished arm is not trained again; an interrupted one continues.
"""
import argparse
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import torch

from rsground_nb.align import coverage, read_texts, response_loss, structure_loss
from rsground_nb.evaluate import predict
from rsground_nb.folders import to_dataset
from rsground_nb.masks import make_segmenter, mask_loss, masks_of_boxes, predict_masks, to_picture
from rsground_nb.model import load_tiny
from rsground_nb.pretrain import run_steps
from rsground_nb.scenes import scene_records
from rsground_nb.segmentation import (TINY, OneStage, Questions, drawn, judge_masks, segment_rows,
                                      train_segmenter)
from rsground_nb.shapes import decode_mask

ARMS = {"whole": {}, "no SCR": dict(structure=0.0), "no dense prompt": dict(use=("sparse", "cues")),
        "no sparse prompts": dict(use=("dense", "cues")), "no cues": dict(use=("sparse", "dense"))}


def one_stage(rows, size, seed, folder):
    """The baseline, trained with as many steps as the align and ground stages have together."""
    torch.manual_seed(seed)
    whole = make_segmenter(seed=seed)
    model, questions = OneStage(whole.aligner, whole.canvas, whole.tools), Questions(rows)
    folder.mkdir(parents=True, exist_ok=True)

    def loss_at(step):
        rng = np.random.default_rng([seed, 4, step])
        views, texts, picture, targets = drawn(whole, questions, size, rng)
        aligned, logits = model(views.clip, texts, picture)
        loss = mask_loss(logits, targets) + response_loss(aligned.sentence, coverage(targets, 14))
        loss = loss + size.structure * structure_loss(aligned, texts)
        return loss, dict(loss=loss.item())

    run_steps("one", model, list(model.parameters()), loss_at, size.align_steps + size.ground_steps, folder,
              size.align_rate)

    @torch.no_grad()
    def answer(images, expressions):
        texts = read_texts(whole.tools.tokenizer, expressions)
        _, made = model.eval()(whole.views(images).clip, texts, torch.arange(len(images)))
        return [to_picture(logits, image) for logits, image in zip(made, images)]
    return answer


def with_boxes(model, boxes, side):
    """Answers with SAM, prompted by one box a row in order. A missing box, or one without area, gives an
    empty mask."""
    left = iter(boxes)

    def answer(images, expressions):
        found = [next(left) for _ in images]
        cut = [box and tuple(min(max(v, 0), side) for v in box) for box in found]
        fine = [bool(box) and box[0] < box[2] and box[1] < box[3] for box in cut]
        asked = [k for k, good in enumerate(fine) if good]
        masks = [np.zeros((side, side), bool) for _ in images]
        made = masks_of_boxes(model, [images[k] for k in asked], [cut[k] for k in asked]) if asked else []
        for k, mask in zip(asked, made): masks[k] = mask
        return masks
    return answer


def largest(rows):
    def size(box): return (box[2] - box[0]) * (box[3] - box[1])
    return [max((o["box"] for o in things), key=size) for things in rows["objects"]]


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("out", type=Path)
    for name, count in (("seeds", 5), ("scenes", 6000), ("questions", 512)):
        parser.add_argument(f"--{name}", type=int, default=count)
    args = parser.parse_args()
    test, found = to_dataset(list(scene_records(args.questions, 0, split="test"))), []
    vlm = [p["predicted"] for p in predict(*load_tiny("grpo"), test, 160, 64)]  # None: no box
    side = test[0]["width"]

    def note(arm, seed, answer, began):
        scores, each = judge_masks(answer, test, seed=seed)
        found.append(dict(arm=arm, seed=seed, minutes=round((time.time() - began) / 60, 1), **scores))
        areas = np.array([decode_mask(m).mean() for m in test["mask"]])
        small = areas < np.median(areas)
        found[-1] |= dict(small=np.mean(np.array(each)[small]), large=np.mean(np.array(each)[~small]))
        pd.DataFrame(found).round(4).to_csv(Path(__file__).with_suffix(".csv"), index=False)

    for seed in range(args.seeds):
        rows = segment_rows(args.scenes, seed)
        for arm, change in ARMS.items():
            began = time.time()
            folder = args.out / f"{seed}-{arm.replace(' ', '-')}"
            model = train_segmenter(rows, replace(TINY, **change), seed, folder)
            note(arm, seed, lambda images, texts: predict_masks(model, images, texts), began)
            if arm == "whole":
                boxes = {"GRPO's box": vlm, "true box": test["box"][:], "largest object": largest(test)}
                for name, given in boxes.items():
                    note(name, seed, with_boxes(model, given, side), time.time())
        began = time.time()
        note("one stage", seed, one_stage(rows, TINY, seed, args.out / f"{seed}-one-stage"), began)


if __name__ == "__main__":
    main()
