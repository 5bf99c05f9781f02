"""Studies: trainings that differ in one idea, five seeds of each. The tables hold what is finished.

    python tests/studies.py data OUT REAL          the questions, in OUT/rows (REAL: as in train_shipped.py)
    python tests/studies.py starts OUT [NAME ...]  the models that GRPO starts from, in OUT/starts
    python tests/studies.py run OUT STUDY ...      every run that OUT/runs lacks; STUDY: a name of STUDIES
    python tests/studies.py trials OUT             choice of the learning rates: tests/trials_studies.csv
    python tests/studies.py table OUT              tests/studies.csv (a row for each run and set of questions)
                                                   studies_effects.csv, studies_log.csv, studies_hits.csv
                                                   (share of rollouts that hit; each seed of "longer") and
                                                   predictions/

Students that answer without thoughts: a rollout has 18 tokens instead of 65, and the rewards are about boxes.
Studies whose name begins with "thoughts" are about students that think. GRPO asks 4,096 drawn questions with
a rival and 4,096 real ones; all have boxes only. Judged greedily on questions by which nothing was chosen:
512 drawn ones with a rival (seed 3110), 512 of all kinds (3111), and the real test questions. Learning rates
were chosen on val and on drawn questions of seed 2000, with IoU and format as the only rewards, by one seed.
"""
import json
import os
import sys
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from zipfile import ZIP_LZMA, ZipFile, ZipInfo

import numpy as np
import pandas as pd
import torch
from datasets import concatenate_datasets, load_from_disk

from benchmark_thinking import completions, to_learn
from rsground_nb.ablation import effect
from rsground_nb.boxes import completion_box
from rsground_nb.consistency import agreement
from rsground_nb.drawing import get_style
from rsground_nb.grpo import SpatialGRPOTrainer
from rsground_nb.guards import WEIGHTS
from rsground_nb.masks import load_segmenter
from rsground_nb.model import DIRECT, REASON, codec_of, load_vlm
from rsground_nb.rewards import BoxReward, text_of
from rsground_nb.run import commit
from rsground_nb.scale import get_scale, start
from rsground_nb.segment import mask_iou, masks_for
from rsground_nb.sft import sft_trainer
from rsground_nb.shapes import decode_mask
from rsground_nb.studies import arm_ious, grpo_run, judge_run, run_all, run_id
from planting import planted
from train_shipped import MIRRORS, drawn, learn_chains, real

HERE, SEEDS = Path(__file__).resolve().parent, 5
STARTS = {  # steps of SFT from the base, and what it learns
    "answers-early": (300, "answers"), "answers-middle": (900, "answers"), "chains-early": (400, "chains"),
    "chains-middle": (900, "chains"), "chains-30": (900, "30 %"), "chains-10": (900, "10 %"),
    "chains-faulty": (900, "half of them faulty"), "chains-drawn": (900, "chains of drawn questions")}
FEW = "chains-10", "chains-30", "chains-faulty", "chains-drawn"  # starts with few or faulty chains
RATE, THINK_RATE = 3e-4, 1e-4  # of GRPO
JUDGED, JUDGED_TOO = ("rival", "all", "real"), ("style", "small")
KEPT = {"base": ("start", "IoU", "+ R_pos", "weight alone", "both"),  # components
        "rewards": ("start", "IoU", "+ R_pos", "weight alone"), "consistency": ("paper's weight",),
        "thoughts": ("start", "IoU", "+ R_pos", "weight alone", "both", "more CoT-SFT"),
        "thoughts, longer": ("both",),
        **{f"thoughts, {name}": ("start", "both", "more CoT-SFT") for name in FEW}}
FAULTS = ("wrong_box", "wrong_anchor", "misread", "wrong_candidate", "missing_candidate", "wrong_outcome",
          "wrong_decision")

# what an arm changes: settings of `grpo_run`, or `extra` (below)
R_POS, PLAIN = dict(third="center"), dict(settings=dict(consistency=False))
GROUP = dict(size=dict(scale_rewards="group"))
ANSWERS = dict(max_completion_length=32, rows_per_pass=128, processes=1)  # sizes; 256 rollouts a step
THOUGHTS = dict(processes=1)
HALF = dict(size=dict(prompts_per_step=16))  # 128 rollouts
MORE, MORE_HALF = [dict(steps=steps, rate=1e-3) for steps in (800, 400)]  # the minutes that GRPO takes


def weighted(**settings): return dict(settings=dict(consistency=True, **settings))


STUDIES = {  # name: (start, steps, rate, the arm that others are compared with, arms)
    "rewards": ("answers-early", 50, RATE, "IoU", {
        "IoU": PLAIN, "+ R_pos": R_POS | PLAIN, "+ R_pos, area": dict(third="area") | PLAIN,
        "+ GIoU": dict(third="giou") | PLAIN, "+ DIoU": dict(third="diou") | PLAIN,
        "+ centre distance": dict(third="distance") | PLAIN,
        "+ all-miss credit": dict(extra="credit") | PLAIN, "stepped IoU": dict(extra="stepped") | PLAIN,
        "weight alone": weighted(), "both": R_POS | weighted()}),
    "consistency": ("answers-early", 50, RATE, "no weight", {  # with R_pos
        "no weight": R_POS | PLAIN, "paper's weight": R_POS | weighted(),
        "mean term": R_POS | weighted(lambda_var=0.0), "variance term": R_POS | weighted(lambda_mean=0.0),
        "weights shuffled": R_POS | weighted(weighting="shuffled"),
        "same mean weight": R_POS | weighted(weighting="level"),
        "disagreement": R_POS | weighted(weighting="disagreement")}),
    "settings of R_pos": ("answers-early", 50, RATE, "beta 0.1, alpha 2.5", {
        "beta 0.1, alpha 2.5": R_POS | PLAIN, "beta 0.3": R_POS | dict(beta=0.3) | PLAIN,
        "beta 1": R_POS | dict(beta=1.0) | PLAIN, "alpha 0.8": R_POS | dict(alpha=0.8) | PLAIN,
        "alpha 8": R_POS | dict(alpha=8.0) | PLAIN}),
    "group scaling": ("answers-early", 50, RATE, "IoU", {
        "IoU": GROUP | PLAIN, "+ R_pos": R_POS | GROUP | PLAIN}),
    "longer": ("answers-early", 200, RATE, "IoU", {
        "IoU": dict(extra="hits") | PLAIN, "both": dict(extra="hits") | R_POS | weighted()}),
    "base": ("tiny", 50, RATE, "IoU", {
        "IoU": PLAIN, "+ R_pos": R_POS | PLAIN, "weight alone": weighted(), "both": R_POS | weighted()}),
    "transfer": ("answers-early", 50, RATE, "both kinds", {
        "both kinds": PLAIN, "drawn questions only": dict(asked="rows/grpo_drawn") | PLAIN,
        "real questions only": dict(asked="rows/grpo_real") | PLAIN}),
    "mask reward": ("answers-early", 50, RATE, "IoU", {
        "IoU": dict(asked="rows/grpo_drawn") | PLAIN,
        "+ R_mask": dict(asked="rows/grpo_drawn", extra="mask") | PLAIN}),
    "thoughts": ("chains-middle", 60, THINK_RATE, "IoU", {
        "IoU": PLAIN, "+ R_pos": R_POS | PLAIN, "weight alone": weighted(), "both": R_POS | weighted(),
        "more CoT-SFT": MORE | dict(more="chains")}),
    "thoughts, near": ("tiny-sft", 60, THINK_RATE, "IoU", {"IoU": PLAIN, "+ R_pos": R_POS | PLAIN}),
    "thoughts, longer": ("chains-middle", 180, THINK_RATE, "start", {"both": R_POS | weighted()}),
    "thoughts, far": ("chains-early", 60, THINK_RATE, "IoU", {"IoU": PLAIN, "+ R_pos": R_POS | PLAIN}),
    **{f"thoughts, {name}": (name, 60, THINK_RATE, "more CoT-SFT", {
        "both": R_POS | weighted() | HALF, "more CoT-SFT": MORE_HALF | dict(more=STARTS[name][1])})
       for name in FEW},
}


def prepare(folder, out):
    "Save the rows to learn from (CoT-SFT, GRPO) and the questions that judge."
    def real_rows(chains, like):
        return concatenate_datasets([real(folder / k, "train", 0.14, chains).cast(like.features)
                                     for k in ("0", *MIRRORS)])

    start(0)
    learned, asked = drawn(12288, 0, "train", False), drawn(4096, 1, "grpo", True)
    boxes = real_rows(False, asked).shuffle(seed=0).select(range(4096))
    rows = {"sft": concatenate_datasets([learned, real_rows(True, learned)]),
            "grpo": concatenate_datasets([asked, boxes]), "grpo_drawn": asked, "grpo_real": boxes,
            "rival": drawn(512, 3110, "test", True), "all": drawn(512, 3111, "test", False),
            "real": real(folder / "0", "test", 0.14),
            "style": drawn(256, 3112, "test", True, "other"),
            "small": drawn(256, 3113, "test", True, replace(get_style("simple"), sizes=(0.07, 0.14))),
            "tune": drawn(384, 2000, "val", True), "tune_real": real(folder / "0", "val", 0.14)}
    for name, part in rows.items(): part.save_to_disk(out / "rows" / name)


def learn_texts(model, processor, rows, said, template, steps, rate, seed, out):
    "SFT on one text for each row."
    size = replace(get_scale("workshop"), sft_steps=steps, sft_learning_rate=rate, rows_per_pass=16)
    kept = to_learn(rows, said, template)
    sft_trainer(model, processor, kept, size, seed, out, disable_tqdm=True).train()


def learn_answers(model, processor, rows, *how):
    "SFT on the bare boxes."
    said = completions(rows, codec_of(model.config.model_type, processor), DIRECT)
    learn_texts(model, processor, rows, said, DIRECT, *how)


def learn_faulty(model, processor, rows, steps, rate, seed, out):
    "CoT-SFT; half of the chains, by lot, have a planted fault."
    rng, codec, said = np.random.default_rng(seed), codec_of(model.config.model_type, processor), []
    for row in rows.remove_columns("image"):
        codes = rng.permutation(FAULTS).tolist() if rng.random() < 0.5 else []
        said += [text for _, _, text, _ in planted([row], codec, rng, [*codes, "ok"])]
    learn_texts(model, processor, rows, said, REASON, steps, rate, seed, out)


def learn(what, model, processor, rows, steps, rate, seed, out):
    "What the models of STARTS learn."
    if what == "chains of drawn questions": rows = rows.select(range(12288))
    if what.endswith("%"): rows = rows.shuffle(seed=0).select(range(len(rows) * int(what[:2]) // 100))
    method = {"answers": learn_answers, "half of them faulty": learn_faulty}.get(what, learn_chains)
    method(model, processor, rows, steps, rate, seed, out)


def make_starts(out, names):
    "The models that GRPO starts from."
    rows = load_from_disk(out / "rows" / "sft")
    for name in names or STARTS:
        folder, (steps, what) = out / "starts" / name, STARTS[name]
        if folder.exists(): continue
        start(0)
        model, processor = load_vlm("tiny")
        learn(what, model, processor, rows, steps, 2e-3, 0, out / "trainer" / name)
        processor.save_pretrained(folder)
        model.save_pretrained(folder)


class CreditTrainer(SpatialGRPOTrainer):
    """With the all-miss credit (SCA, docs of rivals): in groups where every rollout has an IoU of 0, the
    advantage 0.3 min(std p / 0.15, 1) z(p), where p falls with the distance of the centres."""

    def _calculate_rewards(self, inputs, prompts, completions, completion_ids_list):
        rewards = super()._calculate_rewards(inputs, prompts, completions, completion_ids_list)
        ious = rewards[:, self.reward_func_names.index("iou_reward")].nan_to_num(0.0)
        self._missed = (ious.view(-1, self._group_size) == 0).all(1, keepdim=True)
        return rewards

    def _generate_and_score_completions(self, inputs):
        batch = super()._generate_and_score_completions(inputs)
        ids = batch["completion_ids"].flatten(0, -2)  # (rollouts, tokens)
        texts = self.processing_class.batch_decode(ids, skip_special_tokens=True)
        codec = codec_of(self.model.config.model_type, self.processing_class)
        rows = zip(texts, inputs, strict=True)
        p = torch.tensor([near(text, row, codec) for text, row in rows]).view(-1, self._group_size)
        spread = p.std(1, keepdim=True)
        credit = 0.3 * (spread / 0.15).clamp(max=1) * (p - p.mean(1, keepdim=True)) / (spread + 1e-4)
        batch["advantages"] += (credit * self._missed).view_as(batch["advantages"])
        return batch


def near(text, row, codec):
    "exp(-distance of the centres / l), l = half the target's diagonal + 50 px; 0 without a box."
    box, (x1, y1, x2, y2) = completion_box(text, codec, row["width"], row["height"]), row["box"]
    if box is None: return 0.0
    distance = np.hypot((box[0] + box[2] - x1 - x2) / 2, (box[1] + box[3] - y1 - y2) / 2)
    return float(np.exp(-distance / (0.5 * max(np.hypot(x2 - x1, y2 - y1), 1) + 50)))


class SteppedReward(BoxReward):
    "1 from an IoU of 0.5, 0.8 IoU from 0.3, else 0 (RS-HyRe-R1)."
    @property
    def __name__(self): return "stepped_reward"

    def __call__(self, completions, **columns):
        return [None if u is None else 1.0 if u >= 0.5 else 0.8 * u if u >= 0.3 else 0.0
                for u in super().__call__(completions, **columns)]


def shuffled(ious, boxes, size): return (w := WEIGHTS["paper"](ious, boxes, size))[torch.randperm(len(w))]


def level(ious, boxes, size): return (w := WEIGHTS["paper"](ious, boxes, size)).mean().expand_as(w)


def disagreement(ious, boxes, size):
    "As the paper's mean term, with the mean IoU between rollouts in place of that with the truth."
    return torch.exp(1.2 * (1 - agreement(boxes.view(-1, size, 4)))).clamp(0.5, 3.0)


WEIGHTS.update(shuffled=shuffled, level=level, disagreement=disagreement)  # placebos; and a true agreement


class HitReward(BoxReward):
    "1 from an IoU of 0.5, else 0. Only logged."
    @property
    def __name__(self): return "hit_reward"

    def __call__(self, completions, **columns):
        return [None if u is None else float(u >= 0.5) for u in super().__call__(completions, **columns)]


class MaskReward:
    "IoU of the mask that the shipped SAM draws for the box (chapter 12); 0 without a box."
    __name__ = "mask_reward"

    def __init__(self, codec, asked):
        self.codec, self.model = codec, load_segmenter("tiny-segment")
        rows = load_from_disk(asked).select_columns(["box", "mask"])
        self.true = {tuple(row["box"]): row["mask"] for row in rows}

    def __call__(self, completions, image, box, width, height, **columns):
        found = [completion_box(text_of(c), self.codec, w, h)
                 for c, w, h in zip(completions, width, height, strict=True)]
        return [mask_iou(mask, decode_mask(self.true[tuple(b)]))
                for mask, b in zip(masks_for(self.model, image, found), box, strict=True)]


def extras(run, codec):
    "Reward functions with their weights."
    if run.get("extra") == "mask": return {MaskReward(codec, run["asked"]): 1.0}
    if run.get("extra") == "hits": return {HitReward("iou", codec): 0.0}
    if run.get("extra") != "stepped": return {}
    return {SteppedReward("iou", codec): 1.0, BoxReward("iou", codec): 0.0}


def work(run, folder):
    if run["steps"] == 0 or "more" in run:  # no GRPO
        start(run["seed"])
        model, processor = load_vlm(run["start"])
        if "more" in run:
            learn(run["more"], model, processor, load_from_disk("rows/sft"), run["steps"], run["rate"],
                  100 + run["seed"], folder / "trainer" / run_id(run))
        template = REASON if run.get("thinks") else DIRECT
        found = dict(ious=judge_run(model, processor, run, folder, template), log={})
    else:
        trainer = CreditTrainer if run.get("extra") == "credit" else SpatialGRPOTrainer
        found = grpo_run(run, folder, trainer, extras)
    return dict(found, commit=commit(), versions={p: version(p) for p in ("torch", "transformers", "trl")})


def runs_of(study):
    "(arm, run) of a study, all arms of a seed before the next seed. `start` is the model before GRPO."
    first, steps, rate, _, arms = STUDIES[study]
    first, sets, size = f"starts/{first}" if first in STARTS else first, JUDGED, ANSWERS
    if study == "thoughts": sets = JUDGED + JUDGED_TOO
    if study.startswith("thoughts"): size = THOUGHTS
    same = dict(start=first, judged={name: f"rows/{name}" for name in sets})
    if study.startswith("thoughts"): same["thinks"] = True
    found = [("start", dict(same, asked="rows/grpo", steps=0, seed=0))]
    for seed in range(SEEDS):
        for arm, change in arms.items():
            if "more" in change: found.append((arm, dict(same, **change, seed=seed)))
            else:
                sizes = dict(grpo_learning_rate=rate, **size | change.get("size", {}))
                run = dict(same, asked="rows/grpo", steps=steps, seed=seed)
                found.append((arm, run | change | dict(size=sizes)))
    return found


def mask_ious(out, run, name, rows):
    "IoU of the masks that SAM draws for the boxes of a run; kept in a file."
    path = out / "runs" / f"{run_id(run)}_{name}_masks.json"
    if not path.exists():
        lines = map(json.loads, (out / "runs" / f"{run_id(run)}_{name}.jsonl").open())
        boxes = {line["expression_id"]: line["predicted"] for line in lines}
        masks = masks_for(load_segmenter("tiny-segment"), rows["image"][:],
                          [boxes[i] for i in rows["expression_id"]])
        path.write_text(json.dumps([mask_iou(m, decode_mask(t)) for m, t in zip(masks, rows["mask"])]))
    return json.loads(path.read_text())


def row_of(study, arm, found, name, hops):
    "A row of studies.csv; `hops`: of each question, None for real ones."
    run, ious = found["run"], np.array(found["ious"][name])
    row = {"study": study, "arm": arm, "seed": run["seed"], "questions": name, "N": len(ious),
           "mIoU": ious.mean(), "Acc@0.5": (ious >= 0.5).mean()}
    if hops is not None: row |= {f"Acc@0.5, {k} hops": (ious[hops == k] >= 0.5).mean() for k in (1, 2, 3)}
    row |= {"steps": run["steps"], "minutes": found["minutes"], "run": run_id(run), **found["versions"],
            "commit": found["commit"][:9], "command": f'python tests/studies.py run OUT "{study}"'}
    for column, values in found["log"].items():
        values = np.array(values)
        row |= {f"{column}, first 10": values[:10].mean(), f"{column}, last 10": values[-10:].mean()}
    return row


def finished(out):
    "study -> arm -> its results, by seed; only arms that all seeds have finished, and their starts."
    done = {}
    for study in STUDIES:
        for arm, run in runs_of(study):
            file = out / "runs" / f"{run_id(run)}.json"
            if file.exists():
                done.setdefault(study, {}).setdefault(arm, []).append(json.loads(file.read_text()))
    whole = {study: {arm: found for arm, found in arms.items() if len(found) == (arm == "start" or SEEDS)}
             for study, arms in done.items()}
    return {study: arms for study, arms in whole.items() if set(arms) - {"start", STUDIES[study][3]}}


def effects_of(study, done, images):
    "Rows of studies_effects.csv: each arm against the one it is compared with, and against the start."
    for arm in [a for a in done if a != "start"]:
        for other in [o for o in dict.fromkeys((STUDIES[study][3], "start")) if o in done and o != arm]:
            sets = {name: [name] for name in done[arm][0]["ious"]} | {"together": list(JUDGED)}
            for name, parts in sets.items():
                mine, theirs = [np.hstack([arm_ious(done[a], n) for n in parts]) for a in (arm, other)]
                gap = effect(mine, theirs, sum([images[n] for n in parts], []))
                yield dict(study=study, arm=arm, against=other, questions=name, **gap)


def keep_predictions(out, done):
    "Write the boxes of the models of KEPT: predictions/STUDY_ARM.zip with a file for each seed and set."
    (HERE / "predictions").mkdir(exist_ok=True)
    for study, arm in [(s, a) for s, arms in KEPT.items() for a in arms if a in done.get(s, {})]:
        name = f"{study}_{arm}".replace(" ", "_").replace("'", "").replace(",", "")
        with ZipFile(HERE / "predictions" / f"{name}.zip", "w", ZIP_LZMA) as kept:
            for found, questions in [(f, q) for f in done[study][arm] for q in JUDGED]:
                lines = []
                for line in (out / "runs" / f"{run_id(found['run'])}_{questions}.jsonl").open():
                    p = json.loads(line)
                    box = p["predicted"] and [round(v, 2) for v in p["predicted"]]
                    lines.append(dict(expression_id=p["expression_id"], predicted=box))
                entry = ZipInfo(f"{found['run']['seed']}_{questions}.jsonl")  # of a fixed date
                kept.writestr(entry, "".join(json.dumps(line) + "\n" for line in lines), ZIP_LZMA)


def table(out):
    "Write the tables; studies_log.csv has some columns of the log, mean over seeds."
    sets = {name: load_from_disk(out / "rows" / name) for name in JUDGED + JUDGED_TOO}
    hops = {name: None if name == "real" else np.array(rows["hops"][:]) for name, rows in sets.items()}
    images = {name: [f"{name}:{i}" for i in rows["image_id"]] for name, rows in sets.items()}
    rows, effects, logs, done = [], [], [], finished(out)
    for found in sum(done.get("mask reward", {}).values(), []):  # also score SAM's masks for the boxes
        for name in ("rival", "all"):
            found["ious"][f"{name}, masks"] = mask_ious(out, found["run"], name, sets[name])
            hops[f"{name}, masks"], images[f"{name}, masks"] = hops[name], images[name]
    keep_predictions(out, done)
    for study, arms in done.items():
        effects += effects_of(study, arms, images)
        for arm, results in arms.items():
            rows += [row_of(study, arm, r, name, hops[name]) for r in results for name in r["ious"]]
            if results[0]["log"]:
                log = pd.concat([pd.DataFrame(r["log"]) for r in results]).groupby(level=0).mean()
                log = log.filter(regex="^reward_std|iou_reward|hit_reward|^groups|^entropy|^grad_norm")
                logs.append(log.rename_axis("step").reset_index().assign(study=study, arm=arm))
    for name, found in (("", rows), ("_effects", effects)):
        pd.DataFrame(found).round(4).to_csv(HERE / f"studies{name}.csv", index=False)
    pd.concat(logs).round(4).to_csv(HERE / "studies_log.csv", index=False)
    hits = [dict(arm=arm, seed=r["run"]["seed"], step=step, hits=share)
            for arm, results in done.get("longer", {}).items() if arm != "start"
            for r in results for step, share in enumerate(r["log"]["rewards/hit_reward/mean"], 1)]
    pd.DataFrame(hits).round(4).to_csv(HERE / "studies_hits.csv", index=False)


def trials():
    "Runs judged on the tuning questions."
    judged = dict(tune="rows/tune", tune_real="rows/tune_real")
    for first, steps, size, rates in (
            ("answers-early", 50, ANSWERS, (1e-4, RATE, 1e-3)),
            ("chains-middle", 60, THOUGHTS | HALF["size"], (THINK_RATE, 3e-4, 6e-4))):
        same = dict(start=f"starts/{first}", judged=judged, seed=0)
        if size is not ANSWERS:
            same["thinks"] = True
            yield same | MORE_HALF | dict(more="chains")
        yield same | dict(asked="rows/grpo", steps=0)
        for rate in rates:
            sizes = dict(grpo_learning_rate=rate, **size)
            yield same | PLAIN | dict(asked="rows/grpo", steps=steps, size=sizes)


def trial_row(found):
    run = found["run"]
    rate = run.get("rate", run.get("size", {}).get("grpo_learning_rate"))
    what = "more CoT-SFT" if "more" in run else "GRPO, IoU and format" if run["steps"] else "start"
    row = dict(start=run["start"].removeprefix("starts/"), arm=what, steps=run["steps"], learning_rate=rate,
               minutes=found["minutes"], commit=found["commit"][:9])
    return row | {f"{name}, mIoU": np.mean(ious) for name, ious in found["ious"].items()}


if __name__ == "__main__":
    import studies  # by its name: other processes cannot find what __main__ defines

    stage, given = sys.argv[1], sys.argv[3:]
    given = [Path(g).resolve() for g in given] if stage == "data" else given
    Path(sys.argv[2]).mkdir(parents=True, exist_ok=True)
    os.chdir(sys.argv[2])
    out = Path()  # runs are named relative to OUT, so that their ids do not depend on the place
    if stage == "data": prepare(*given, out)
    if stage == "starts": make_starts(out, given)
    if stage == "run":
        runs = {run_id(r): r for study in given for _, r in runs_of(study)}  # shared ones once
        runs = sorted(runs.values(), key=lambda r: r["seed"])
        run_all(studies.work, runs, out / "runs")
    if stage == "trials":
        rows = [trial_row(found) for found in run_all(studies.work, [*trials()], out / "trials")]
        pd.DataFrame(rows).round(4).to_csv(HERE / "trials_studies.csv", index=False)
    if stage == "table": table(out)
