"""Train the models that are shipped beside the base: CoT-SFT, then GRPO, on drawn and on real questions.

    rsground data refer PLANES REAL --window 160 256 360 --seed 0
    python tests/train_shipped.py sft REAL OUT       from the base: 3,000 steps, then 2,000 with more real questions
    python tests/train_shipped.py grpo REAL OUT      from OUT/sft: questions with boxes only, on two processes
    python tests/train_shipped.py judge REAL OUT     Acc@0.5 of every stage on the test questions
    python tests/train_shipped.py show REAL OUT      the README's picture: answers of the shipped models to questions drawn by lot

PLANES is `aerial_planes`. Its training pictures are dealt out by a hash of their name: one half has chains, for CoT-SFT, the other has boxes only, for GRPO. Settings were chosen on val and on drawn questions of
seed 2000; test questions are those of the test airports and of seeds 3000 and 3001. Minutes and scores stand in the cards of the models.
"""
import hashlib
import sys
import time
from dataclasses import replace
from pathlib import Path
from textwrap import wrap

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from datasets import concatenate_datasets

from rsground_nb.boxes import parse_completion
from rsground_nb.cot import rule_drafts
from rsground_nb.data import load_folder, to_dataset
from rsground_nb.evaluate import gain, interval, predict
from rsground_nb.model import DIRECT, REASON, codec_of, load_vlm, to_prompt
from rsground_nb.safeguard import on_processes
from rsground_nb.scale import get_scale, start
from rsground_nb.refer import load_real_samples
from rsground_nb.scenes import as_png, scene_records
from rsground_nb.sft import sft_trainer
from rsground_nb.train import grpo_rows, grpo_trainer

WORKSHOP, TABLE = get_scale("workshop"), Path(__file__).parent / "shipped.csv"


def drawn(count, seed, split, rivals):
    """Drawn questions, a third for each number of hops; `rivals`: only those with a second object of the category, else seven tenths of the others are left out."""
    found = []
    for k, row in enumerate(scene_records(6 * count, seed, split=split, hops=(1, 2, 3))):
        many = sum(o["category"] == row["category"] for o in row["objects"]) > 1
        if many or (not rivals and np.random.default_rng([seed, k]).random() < 0.3): found.append(row)
        if len(found) == count: return to_dataset(found)
    raise ValueError(f"only {len(found)} of {count} rows")


def with_chains(name):
    """Which half of the real training pictures has chains."""
    return int(hashlib.sha256(name.split("/")[-1].split(".")[0].split("-")[0].encode()).hexdigest(), 16) % 2 == 0


def real(folder, split, least, chains=None):
    """Real questions in square pictures with at most eight objects, the target's longer side at least `least` of the picture's; `chains`: of one half of the pictures only."""
    rows = load_folder(folder)[0][split]
    seen = zip(rows["box"], rows["width"], rows["height"], rows["objects"], rows["image_id"])
    fits = [max(x2 - x1, y2 - y1) >= least * w and max(w, h) <= 1.05 * min(w, h) and len(o) <= 8 and chains in (None, with_chains(i)) for (x1, y1, x2, y2), w, h, o, i in seen]
    return rows.select(np.flatnonzero(fits))


def learn_chains(model, processor, rows, steps, rate, seed, out):
    """CoT-SFT on the chains of the rule teacher; those of more than 150 tokens are left out."""
    drafts = rule_drafts(rows, codec_of(model.config.model_type, processor))
    chains = rows.select_columns(["image"]).add_column("prompt", [to_prompt(e) for e in rows["expression"]])
    chains = chains.add_column("completion", [[{"role": "assistant", "content": [{"type": "text", "text": d.completion}]}] for d in drafts])
    chains = chains.select([k for k, d in enumerate(drafts) if d.completion and len(processor.tokenizer(d.completion).input_ids) <= 150])
    size = replace(WORKSHOP, sft_steps=steps, sft_learning_rate=rate, rows_per_pass=16)
    trainer = sft_trainer(model, processor, chains, size, seed, out, disable_tqdm=True)
    trainer.train()
    return pd.DataFrame([r for r in trainer.state.log_history if "loss" in r])


def train_sft(folder, out):
    start(0)
    began, (model, processor), scenes = time.time(), load_vlm("tiny"), drawn(12288, 0, "train", False)
    first = learn_chains(model, processor, concatenate_datasets([scenes, real(folder, "train", 0.09, True)]), 3000, 2e-3, 0, out / "trainer")
    start(1)
    second = learn_chains(model, processor, concatenate_datasets([scenes, *[real(folder, "train", 0.14, True)] * 4]), 2000, 1.5e-3, 1, out / "trainer")
    save(model, processor, out / "sft", pd.concat([first, second]), began)


def train_grpo(folder, out, steps=80, seed=0):
    """Every process of two calls it."""
    start(seed)
    began, (model, processor) = time.time(), load_vlm(str(out / "sft"))
    asked = [drawn(4096, 1, "grpo", False), real(folder, "train", 0.14, False)]
    rows, size = grpo_rows(concatenate_datasets(asked).shuffle(seed=seed)), replace(WORKSHOP, grpo_steps=steps)
    trainer = grpo_trainer(model, processor, rows, codec_of(model.config.model_type, processor), size, seed, out / "trainer", disable_tqdm=True)
    trainer.train()
    log = pd.DataFrame([r for r in trainer.state.log_history if "loss" in r])
    if trainer.is_world_process_zero(): save(trainer.accelerator.unwrap_model(trainer.model), processor, out / "grpo", log, began)


def save(model, processor, folder, log, began):
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    log.assign(minutes=round((time.time() - began) / 60, 2)).to_csv(folder / "log.csv", index=False)


def judge(folder, out):
    """Acc@0.5 and mean IoU with intervals, for each stage and set of questions, and the change of mean IoU over the stage before, paired by question; the base is asked for the box alone."""
    start(0)
    sets = {"drawn, with a rival": drawn(512, 3000, "test", True), "drawn, all kinds": drawn(512, 3001, "test", False), "real, test airports": real(folder, "test", 0.14)}
    table, before = [], {}
    for stage, name, template in (("base", "tiny", DIRECT), ("CoT-SFT", out / "sft", REASON), ("GRPO", out / "grpo", REASON)):
        if isinstance(name, Path) and not name.exists(): continue
        model, processor = load_vlm(str(name))
        for what, rows in sets.items():
            found = predict(model, processor, rows, 160, 64, template=template)
            ious = np.array([p["iou"] for p in found])
            low, high = interval((ious >= 0.5).astype(float), [p["image_id"] for p in found])
            hops = {f"hops {k}": (ious[np.array(rows["hops"]) == k] >= 0.5).mean() for k in (1, 2, 3)}
            table.append({"stage": stage, "questions": what, "N": len(rows), "mIoU": ious.mean(), "Acc@0.5": (ious >= 0.5).mean(), "low": low, "high": high, **hops,
                          **(gain(found, before[what]) if what in before else {})})
            before[what] = found
            print(table[-1], flush=True)
    pd.DataFrame(table).round(4).to_csv(TABLE, index=False)


def show(picture):
    """Four real and four drawn questions, drawn by lot: the truth (green), the box of the base (blue) and of the model after GRPO (orange), and its thought."""
    rows = [*load_real_samples().shuffle(seed=0).select(range(4)), *drawn(512, 3000, "test", True).shuffle(seed=0).select(range(4))]
    rows = to_dataset([{**row, "image": {"bytes": as_png(row["image"]), "path": None}} for row in rows])
    found = {name: predict(*load_vlm(name, None), rows, 160, 8, template) for name, template in (("tiny", DIRECT), ("tiny-grpo", REASON))}
    fig, axes = plt.subplots(2, 4, figsize=(12, 8.6), dpi=75)
    for ax, row, first, last in zip(axes.flat, rows, *found.values()):
        ax.imshow(row["image"])
        for box, colour, grow in ((row["box"], "lime", 0.012), (first["predicted"], "deepskyblue", 0), (last["predicted"], "darkorange", 0)):
            if box is None: continue
            x1, y1, x2, y2 = box
            gap = grow * row["width"]
            ax.add_patch(plt.Rectangle((x1 - gap, y1 - gap), x2 - x1 + 2 * gap, y2 - y1 + 2 * gap, fill=False, edgecolor=colour, linewidth=2))
        ax.set_title("\n".join(wrap(row["expression"], 34)), fontsize=11, parse_math=False)
        ax.set_xlabel("\n".join(wrap(parse_completion(last["answer"]).thinking, 46)[:4]), fontsize=8, parse_math=False)
        ax.set(xticks=[], yticks=[])
    fig.tight_layout(h_pad=2)
    fig.savefig(picture, pil_kwargs={"quality": 88})


if __name__ == "__main__":
    import train_shipped  # by its name: other processes cannot find what __main__ defines

    stage, folder, out = sys.argv[1], sys.argv[2], Path(sys.argv[3])
    if stage == "sft": train_sft(folder, out)
    if stage == "grpo": on_processes(2, train_shipped.train_grpo, folder, out)
    if stage == "judge": judge(folder, out)
    if stage == "show": show(Path(__file__).parent.parent / "nbs" / "images" / "answers.jpg")
