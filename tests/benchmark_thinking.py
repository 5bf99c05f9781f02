"""Does thinking pay? Chains against answers alone, over five seeds, by hops; and what a chain costs the
answer.

    python tests/benchmark_thinking.py RUN
        every training that tests/benchmark_thinking.csv lacks (RUN keeps nothing else)
    python tests/benchmark_thinking.py --show  the table: means over seeds, differences with 95 % intervals

All start from the shipped base and learn from the same 8,192 drawn questions (a third for each number of
hops), each seed in another order. "chains": CoT-SFT. "answers": the same questions and steps, answered
without thoughts. "answers, same minutes" (one seed): 1,100 steps, which take about as long as 700 of chains.
"chains, answer x4" (one seed): each token of the answer counts four times. Judged greedily on 768 questions
that nothing was chosen by (test scenes of seed 3100). For the arms with chains: how often the thought is word
for word the true one and how good the answers are then, the accuracy with the true thought given, and the
loss of thought and answer apart in the first and the last steps.
"""
import sys
import time
from pathlib import Path

import numpy as np
import pandas as pd
import torch
import torch.nn.functional as F

from rsground_nb.boxes import completion_box, iou
from rsground_nb.cot import rule_drafts
from rsground_nb.data import to_dataset
from rsground_nb.evaluate import interval, predict
from rsground_nb.model import DIRECT, REASON, codec_of, load_vlm, to_prompt
from rsground_nb.scale import get_scale, start
from rsground_nb.scenes import scene_records
from rsground_nb.sft import sft_trainer
from dataclasses import replace

TABLE, ITEMS = (Path(__file__).parent / "benchmark_thinking.csv",
                Path(__file__).parent / "benchmark_thinking_hits.csv")
ARMS = {  # template, steps, weight of an answer's token, seeds
    "chains": (REASON, 700, 1, 5),
    "answers": (DIRECT, 700, 1, 5),
    "answers, same minutes": (DIRECT, 1100, 1, 1),
    "chains, answer x4": (REASON, 700, 4, 1),
}
RATE, BATCH = 2e-3, 16


def drawn(count, seed, split):
    """Questions with a rival of the target's category, a third for each number of hops."""
    rows = {1: [], 2: [], 3: []}
    for row in scene_records(6 * count, seed, split=split, hops=(1, 2, 3)):
        mine = rows[row["hops"]]
        rivals = sum(o["category"] == row["category"] for o in row["objects"]) - 1
        if rivals and len(mine) < -(-count // 3): mine.append(row)
        if min(map(len, rows.values())) == -(-count // 3): break
    found = [row for group in zip(*rows.values()) for row in group][:count]
    assert len(found) == count, len(found)
    return to_dataset(found)


def completions(rows, codec, template):
    """The text to learn for each row: the chain of the rule teacher, or the bare box."""
    if template == REASON: return [d.completion for d in rule_drafts(rows, codec)]
    return [str([*codec.encode(b, w, h)]) for b, w, h in zip(rows["box"], rows["width"], rows["height"])]


def to_learn(rows, said, template):
    "The columns that `sft_trainer` needs; `said`: the text to learn for each row."
    prompts = [to_prompt(e, template) for e in rows["expression"]]
    return rows.select_columns(["image"]).add_column("prompt", prompts).add_column("completion", [
        [dict(role="assistant", content=[dict(type="text", text=s)])] for s in said])


class PartsLoss:
    """Cross entropy with a weight for the answer's tokens; keeps the plain mean of
    the two parts for each step."""

    def __init__(self, token, weight): self.token, self.weight, self.log = token, weight, []

    def __call__(self, outputs, labels, num_items_in_batch=None):
        targets = labels[:, 1:]
        losses = F.cross_entropy(outputs.logits[:, :-1].transpose(1, 2), targets, ignore_index=-100,
                                 reduction="none")
        scored, answer = targets != -100, (targets == self.token).cumsum(1) > 0
        parts = [losses[scored & part].mean().item() if (scored & part).any() else np.nan
                 for part in (~answer, answer)]
        self.log.append(parts)
        weights = torch.where(answer, self.weight, 1.0) * scored
        return (weights * losses).sum() / weights.sum()


def train(arm, seed, rows):
    template, steps, weight, _ = ARMS[arm]
    start(seed)
    model, processor = load_vlm("tiny")
    said = completions(rows, codec_of(model.config.model_type, processor), template)
    chains = to_learn(rows, said, template)
    size = replace(get_scale("workshop"), sft_steps=steps, sft_learning_rate=RATE, sft_batch_size=BATCH,
                   rows_per_pass=BATCH)
    trainer = sft_trainer(model, processor, chains, size, seed, RUN / "trainer", disable_tqdm=True)
    parts = PartsLoss(processor.tokenizer.convert_tokens_to_ids("<answer>"), weight)
    if template == REASON: trainer.compute_loss_func = parts
    began = time.time()
    trainer.train()
    return model, processor, parts.log, (time.time() - began) / 60


def with_true_thoughts(model, processor, rows, codec):
    """IoU of the answers where the true thought is given."""
    said, found = completions(rows, codec, REASON), []
    for k in range(0, len(rows), 64):
        part = rows.select(range(k, min(k + 64, len(rows))))
        texts = [processor.apply_chat_template(to_prompt(e), add_generation_prompt=True, tokenize=False)
                 + s.split("<answer>")[0] + "<answer>" for e, s in zip(part["expression"], said[k:])]
        batch = processor(text=texts, images=[[i.convert("RGB")] for i in part["image"]], padding=True,
                          return_tensors="pt")
        made = model.generate(**batch, max_new_tokens=30, do_sample=False)
        ends = processor.batch_decode(made[:, batch.input_ids.shape[1]:], skip_special_tokens=True)
        boxes = [completion_box("<answer>" + e, codec, w, h)
                 for e, w, h in zip(ends, part["width"], part["height"])]
        found += [0.0 if b is None else iou(b, t) for b, t in zip(boxes, part["box"])]
    return np.array(found)


def judge(arm, seed, rows, model, processor, log, minutes):
    template = ARMS[arm][0]
    codec = codec_of(model.config.model_type, processor)
    found = predict(model, processor, rows, 160, 64, template=template)
    hits = np.array([p["iou"] for p in found]) >= 0.5
    hops = np.array(rows["hops"])
    row = dict(arm=arm, seed=seed, steps=ARMS[arm][1], minutes=minutes, acc=hits.mean(),
               mIoU=np.mean([p["iou"] for p in found]),
               **{f"hops {h}": hits[hops == h].mean() for h in (1, 2, 3)})
    if template == REASON:
        true = np.array([p["answer"].split("</think>")[0] == s.split("</think>")[0]
                         for p, s in zip(found, completions(rows, codec, REASON))])
        given, first, last = (with_true_thoughts(model, processor, rows, codec) >= 0.5, np.mean(log[:100], 0),
                              np.mean(log[-100:], 0))
        row |= dict(true_thoughts=true.mean(), acc_if_true=hits[true].mean(), acc_if_not=hits[~true].mean(),
                    acc_given_thought=given.mean(),
                    **{f"given, hops {h}": given[hops == h].mean() for h in (1, 2, 3)},
                    thought_first=first[0], thought_last=last[0], answer_first=first[1], answer_last=last[1])
    return row, hits


def show():
    table, hits = pd.read_csv(TABLE), pd.read_csv(ITEMS, index_col=0)
    print(table.groupby("arm").mean(numeric_only=True).drop(columns="seed").round(3).T.to_string())
    hops, images = hits.pop("hops"), hits.pop("image")
    mean = {arm: hits[[c for c in hits if c.rsplit("/", 1)[0] == arm]].mean(axis=1)
            for arm in table.arm.unique()}
    for other in mean:
        if other == "chains": continue
        for part in ("all", 1, 2, 3):
            chosen = slice(None) if part == "all" else hops == part
            gap = (mean["chains"] - mean[other])[chosen]
            low, high = interval(gap, images[chosen])
            print(f"chains - {other}, hops {part}: {gap.mean():+.3f} ({low:+.3f} to {high:+.3f})")


if __name__ == "__main__":
    if sys.argv[1] == "--show": sys.exit(show())
    RUN = Path(sys.argv[1])
    learned, asked = drawn(8192, 0, "train"), drawn(768, 3100, "test")
    table = pd.read_csv(TABLE) if TABLE.exists() else pd.DataFrame(columns=["arm", "seed"])
    hits = (pd.read_csv(ITEMS, index_col=0) if ITEMS.exists()
            else pd.DataFrame(dict(hops=asked["hops"], image=asked["image_id"])))
    for seed in range(5):
        for arm, (*_, seeds) in ARMS.items():
            if seed >= seeds or ((table.arm == arm) & (table.seed == seed)).any(): continue
            row, hit = judge(arm, seed, asked, *train(arm, seed, learned))
            print(row, flush=True)
            table, hits[f"{arm}/{seed}"] = pd.concat([table, pd.DataFrame([row])]), hit.astype(int)
            table.round(4).to_csv(TABLE, index=False)
            hits.to_csv(ITEMS)
