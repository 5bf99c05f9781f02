"""Train the models that are shipped beside the base: CoT-SFT, then GRPO, on drawn and on real questions.

    python tests/train_shipped.py turn PLANES TURNED
        two mirrored copies of each training picture, in TURNED/3 and TURNED/4
    rsground data refer PLANES REAL/0 --window 160 256 360 --seed 0
    rsground data refer TURNED/3 REAL/3 --window 140 180 225 290 360 --seed 3
    rsground data refer TURNED/4 REAL/4 --window 150 200 256 320 --seed 4
    python tests/train_shipped.py sft REAL OUT
        from the base: four parts; the last two with mirrored pictures, the last one with the vision tower
    python tests/train_shipped.py ask REAL OUT
        the questions for GRPO: those that four rollouts answer differently
    python tests/train_shipped.py grpo REAL OUT SEED
        from OUT/sft: questions with boxes only
    python tests/train_shipped.py more REAL OUT SEED STEPS   its control: as many minutes of more CoT-SFT
    python tests/train_shipped.py judge REAL OUT       Acc@0.5 of every stage on the test questions
    python tests/train_shipped.py answers REAL MODEL   the same for a model that answers without thoughts
    python tests/train_shipped.py show REAL OUT        the README's picture: answers to questions drawn by lot

PLANES is `aerial_planes`. Its training pictures are dealt out by a hash of their name: one half has
chains, for CoT-SFT, the other has boxes only, for GRPO. Settings were chosen on val and on drawn questions
of seed 2000; test questions are those of the test airports and of seeds 3010 and 3011. Minutes and scores
stand in the cards of the models.
"""
import hashlib
import json
import sys
import time
from dataclasses import replace
from pathlib import Path
from textwrap import wrap

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from datasets import concatenate_datasets
from PIL import Image

from benchmark_thinking import to_learn
from rsground_nb.boxes import completion_box, iou, parse_completion
from rsground_nb.cot import rule_drafts
from rsground_nb.data import load_folder, to_dataset
from rsground_nb.evaluate import interval, predict
from rsground_nb.model import DIRECT, REASON, codec_of, generate_answers, load_vlm
from rsground_nb.scale import get_scale, start
from rsground_nb.refer import load_real_samples
from rsground_nb.scenes import as_png, scene_records
from rsground_nb.sft import sft_trainer
from rsground_nb.train import grpo_rows, grpo_trainer

WORKSHOP, TABLE = get_scale("workshop"), Path(__file__).parent / "shipped.csv"
MIRRORS = ("3", "4")  # bit 0 of the number: mirrored at the diagonal, bit 1: left-right, bit 2: top-bottom


def turn(planes, out):
    """Write mirrored copies of the training pictures with their boxes, a folder for each of MIRRORS."""
    known = json.loads((planes / "train" / "_annotations.coco.json").read_text())
    flips = (Image.Transpose.TRANSPOSE, Image.Transpose.FLIP_LEFT_RIGHT, Image.Transpose.FLIP_TOP_BOTTOM)
    for mirror in MIRRORS:
        folder, images, sizes = out / mirror / "train", [], {}
        folder.mkdir(parents=True)
        for entry in known["images"]:
            picture, (stem, _, end) = (Image.open(planes / "train" / entry["file_name"]).convert("RGB"),
                                       entry["file_name"].partition("."))
            for bit, flip in enumerate(flips):
                if int(mirror) >> bit & 1: picture = picture.transpose(flip)
            name = f"{stem}.t{mirror}.{end}"
            picture.save(folder / name, quality=95)
            images.append(dict(entry, file_name=name, width=picture.width, height=picture.height))
            sizes[entry["id"]] = picture.size
        boxes = [dict(a, bbox=turned(a["bbox"], sizes[a["image_id"]], int(mirror)), segmentation=[])
                 for a in known["annotations"]]
        (folder / "_annotations.coco.json").write_text(json.dumps(dict(known, images=images,
                                                                       annotations=boxes)))


def turned(box, size, mirror):
    """[x, y, w, h] in the mirrored picture of (width, height) `size`."""
    x, y, w, h = box
    if mirror & 1: x, y, w, h = y, x, h, w
    return [size[0] - x - w if mirror & 2 else x, size[1] - y - h if mirror & 4 else y, w, h]


def drawn(count, seed, split, rivals, style="simple"):
    """Drawn questions, a third for each number of hops; `rivals`: only those with a second object of the
    category, else seven tenths of the others are left out."""
    found = []
    for k, row in enumerate(scene_records(6 * count, seed, split=split, hops=(1, 2, 3), style=style)):
        many = sum(o["category"] == row["category"] for o in row["objects"]) > 1
        if many or (not rivals and np.random.default_rng([seed, k]).random() < 0.3): found.append(row)
        if len(found) == count: return to_dataset(found)
    raise ValueError(f"only {len(found)} of {count} rows")


def with_chains(name):
    """Which half of the real training pictures has chains."""
    return int(hashlib.sha256(name.split("/")[-1].split(".")[0].split("-")[0].encode()).hexdigest(),
               16) % 2 == 0


def real(folder, split, least, chains=None):
    """Real questions in square pictures with at most eight objects, the target's longer side at least `least`
    of the picture's; `chains`: of one half of the pictures only."""
    rows = load_folder(folder)[0][split]
    seen = zip(rows["box"], rows["width"], rows["height"], rows["objects"], rows["image_id"])
    fits = [max(x2 - x1, y2 - y1) >= least * w and max(w, h) <= 1.05 * min(w, h) and len(o) <= 8
            and chains in (None, with_chains(i)) for (x1, y1, x2, y2), w, h, o, i in seen]
    return rows.select(np.flatnonzero(fits))


def learn_chains(model, processor, rows, steps, rate, seed, out, tower=False):
    """CoT-SFT on the chains of the rule teacher; those of more than 150 tokens are left out. `tower`: the
    vision tower learns, too."""
    drafts = rule_drafts(rows, codec_of(model.config.model_type, processor))
    chains = to_learn(rows, [d.completion for d in drafts], REASON)
    chains = chains.select([k for k, d in enumerate(drafts) if d.completion
                            and len(processor.tokenizer(d.completion).input_ids) <= 150])
    size = replace(WORKSHOP, sft_steps=steps, sft_learning_rate=rate, rows_per_pass=16)
    trainer = sft_trainer(model, processor, chains, size, seed, out, disable_tqdm=True)
    trainer.model.model.visual.requires_grad_(tower)
    trainer.train()
    return pd.DataFrame([r for r in trainer.state.log_history if "loss" in r])


def train_sft(folder, out):
    start(0)
    began, (model, processor), scenes = time.time(), load_vlm("tiny"), drawn(12288, 0, "train", False)
    least = {k: [real(folder / "0", "train", k, True)] for k in (0.09, 0.14)}
    turned = [real(folder / k, "train", 0.14, True).cast(scenes.features) for k in MIRRORS]
    mixed = [drawn(6000, 0, "train", False), *least[0.14], *turned]
    parts = [([scenes, *least[0.09]], 3000, 2e-3, 0, False),
             ([scenes, *least[0.14] * 4], 2000, 1.5e-3, 1, False),
             (mixed, 1500, 1e-3, 0, False), (mixed, 1500, 1e-3, 7, True)]
    logs = []
    for rows, steps, rate, seed, tower in parts:
        start(seed)
        logs.append(learn_chains(model, processor, concatenate_datasets(rows), steps, rate, seed,
                                 out / "trainer", tower))
    save(model, processor, out / "sft", pd.concat(logs), began)


def candidates(folder):
    """Questions whose chains CoT-SFT has not seen: other scenes, and the other half of the real pictures."""
    scenes = drawn(4096, 1, "grpo", False)
    return concatenate_datasets([scenes, *[real(folder / k, "train", 0.14, False).cast(scenes.features)
                                           for k in ("0", *MIRRORS)]])


def ask(folder, out, count=6072):
    """Write OUT/asked.json: of `count` questions drawn by lot, those where the IoUs of four
    rollouts lie 0.4 apart or more."""
    start(0)
    rows, (model, processor) = candidates(folder), load_vlm(str(out / "sft"))
    codec, lot = codec_of(model.config.model_type,
                          processor), np.random.default_rng(0).permutation(len(rows))[:count]
    kept = []
    for k in range(0, count, 128):
        part = rows.select(lot[k:k + 128])
        ious = []
        for _ in range(4):
            said = generate_answers(model, processor, part["image"][:], part["expression"][:], batch_size=128,
                                    do_sample=True, temperature=0.8)
            boxes = [completion_box(s, codec, w, h) for s, w, h in zip(said, part["width"], part["height"])]
            ious.append([0.0 if b is None else iou(b, t) for b, t in zip(boxes, part["box"])])
        kept += lot[k:k + 128][np.ptp(ious, axis=0) >= 0.4].tolist()
        print(f"{len(kept)} of {k + len(part)} questions", flush=True)
    (out / "asked.json").write_text(json.dumps(kept))


def train_grpo(folder, out, seed, steps=68):
    "Once through the questions."
    start(seed)
    began, (model, processor) = time.time(), load_vlm(str(out / "sft"))
    asked = candidates(folder).select(json.loads((out / "asked.json").read_text()))
    rows, size = grpo_rows(asked.shuffle(seed=seed)), replace(WORKSHOP, grpo_steps=steps)
    trainer = grpo_trainer(model, processor, rows, codec_of(model.config.model_type, processor), size, seed,
                           out / f"trainer-{seed}", disable_tqdm=True)
    trainer.train()
    log = pd.DataFrame([r for r in trainer.state.log_history if "loss" in r])
    save(trainer.model, processor, out / f"grpo-{seed}", log, began)


def save(model, processor, folder, log, began):
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    log.assign(minutes=round((time.time() - began) / 60, 2)).to_csv(folder / "log.csv", index=False)


def more_sft(folder, out, seed, steps):
    "The control of GRPO: as many minutes of more CoT-SFT as in its last part."
    start(seed)
    began, (model, processor) = time.time(), load_vlm(str(out / "sft"))
    scenes = drawn(6000, 0, "train", False)
    parts = [real(folder / k, "train", 0.14, True).cast(scenes.features) for k in ("0", *MIRRORS)]
    log = learn_chains(model, processor, concatenate_datasets([scenes, *parts]), steps, 1e-3, 100 + seed,
                       out / f"trainer-more-{seed}", tower=True)
    save(model, processor, out / f"more-{seed}", log, began)


def judged_sets(folder):
    return {"drawn, with a rival": drawn(512, 3010, "test", True),
            "drawn, all kinds": drawn(512, 3011, "test", False),
            "real, test airports": real(folder / "0", "test", 0.14)}


def judge_answers(folder, model):
    "The same questions for a model that answers without thoughts (answers-middle of studies.py)."
    table = []
    for what, rows in judged_sets(folder).items():
        found = predict(*load_vlm(str(model)), rows, 160, 64, template=DIRECT)
        hits = np.array([p["iou"] >= 0.5 for p in found])
        low, high = interval(hits, rows["image_id"][:])
        table.append({"questions": what, "N": len(rows), "mIoU": np.mean([p["iou"] for p in found]),
                      "Acc@0.5": hits.mean(), "low": low, "high": high})
    pd.DataFrame(table).round(4).to_csv(TABLE.with_stem("shipped_answers"), index=False)


def judge(folder, out):
    """Acc@0.5 and mean IoU of every stage on every set of questions, with 95 % intervals over pictures, and
    the change of both over CoT-SFT, paired by question. A stage of several seeds counts with the mean over
    them. The base is asked for the box alone."""
    start(0)
    sets = judged_sets(folder)
    stages = {"base": ["tiny"], "CoT-SFT": [out / "sft"], "GRPO": sorted(out.glob("grpo-?")),
              "more CoT-SFT": sorted(out.glob("more-?"))}
    items = []
    for what, rows in sets.items():
        for stage, names in stages.items():
            template = DIRECT if stage == "base" else REASON
            for k, name in enumerate(names):
                found = predict(*load_vlm(str(name)), rows, 160, 64, template=template)
                items += [dict(questions=what, stage=stage, seed=k, item=i, iou=round(p["iou"], 4))
                          for i, p in enumerate(found)]
            print(what, stage, flush=True)
    pd.DataFrame(items).to_csv(out / "items.csv", index=False)
    summarise(pd.DataFrame(items), sets).to_csv(TABLE, index=False)


def summarise(items, sets):
    "The rows of shipped.csv; those of all kinds that have no rival also apart."
    mixed = sets["drawn, all kinds"]
    alone = np.array([sum(o["category"] == category for o in things) == 1
                      for category, things in zip(mixed["category"], mixed["objects"])])
    parts = [(what, what, np.ones(len(rows), bool)) for what, rows in sets.items()]
    table = []
    for name, what, keep in parts + [("drawn, without a rival", "drawn, all kinds", alone)]:
        pictures, hops = (np.array(sets[what][c][:])[keep] for c in ("image_id", "hops"))
        mine = items[items.questions == what].pivot(index=["stage", "seed"], columns="item", values="iou")
        before = mine.loc["CoT-SFT"].to_numpy()[0, keep]
        for stage in items.stage.unique():
            each = mine.loc[stage].to_numpy()[:, keep]
            ious, hits = each.mean(0), (each >= 0.5).mean(0)
            row = dict(stage=stage, questions=name, N=keep.sum(), seeds=len(each), mIoU=ious.mean())
            row["Acc@0.5"] = hits.mean()
            row["low"], row["high"] = interval(hits, pictures)
            row |= {f"hops {k}": hits[hops == k].mean() for k in (1, 2, 3)}
            if stage in ("GRPO", "more CoT-SFT"):
                for change, gap in (("gain", ious - before), ("hits", hits - (before >= 0.5))):
                    row[change] = gap.mean()
                    row[f"{change}_low"], row[f"{change}_high"] = interval(gap, pictures)
            table.append(row)
    return pd.DataFrame(table).round(4)


def show(picture):
    """Four real and four drawn questions, drawn by lot: the truth (green), the box of the base (blue) and of
    the model after GRPO (orange), and its thought."""
    rows = [*load_real_samples().shuffle(seed=0).select(range(4)),
            *drawn(512, 3010, "test", True).shuffle(seed=0).select(range(4))]
    rows = to_dataset([{**row, "image": {"bytes": as_png(row["image"]), "path": None}} for row in rows])
    found = {name: predict(*load_vlm(name, None), rows, 160, 8, template)
             for name, template in (("tiny", DIRECT), ("tiny-grpo", REASON))}
    fig, axes = plt.subplots(2, 4, figsize=(12, 8.6), dpi=75)
    for ax, row, first, last in zip(axes.flat, rows, *found.values()):
        ax.imshow(row["image"])
        for box, colour, grow in ((row["box"], "lime", 0.012), (first["predicted"], "deepskyblue", 0),
                                  (last["predicted"], "darkorange", 0)):
            if box is None: continue
            x1, y1, x2, y2 = box
            gap = grow * row["width"]
            ax.add_patch(plt.Rectangle((x1 - gap, y1 - gap), x2 - x1 + 2 * gap, y2 - y1 + 2 * gap, fill=False,
                                       edgecolor=colour, linewidth=2))
        ax.set_title("\n".join(wrap(row["expression"], 34)), fontsize=11, parse_math=False)
        ax.set_xlabel("\n".join(wrap(parse_completion(last["answer"]).thinking, 46)[:4]), fontsize=8,
                      parse_math=False)
        ax.set(xticks=[], yticks=[])
    fig.tight_layout(h_pad=2)
    fig.savefig(picture, pil_kwargs={"quality": 88})


if __name__ == "__main__":
    stage, folder, out = sys.argv[1], Path(sys.argv[2]), Path(sys.argv[3])
    if stage == "turn": turn(folder, out)
    if stage == "sft": train_sft(folder, out)
    if stage == "ask": ask(folder, out)
    if stage == "grpo": train_grpo(folder, out, int(sys.argv[4]))
    if stage == "more": more_sft(folder, out, int(sys.argv[4]), int(sys.argv[5]))
    if stage == "judge": judge(folder, out)
    if stage == "answers": judge_answers(folder, out)  # OUT: the model
    if stage == "show": show(Path(__file__).parent.parent / "nbs" / "images" / "answers.jpg")
