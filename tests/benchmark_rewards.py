"""How many boxes a second do the rewards of a box score, and how long do a step's rewards for 64
completions take, parsing included?

    python tests/benchmark_rewards.py [--boxes 1000000] [--repeats 30] [--seed 0] [--out FILE]

One thread; processor time, so that what else the machine does counts little. A step: the three rewards in
TRL's signature on 64 chains of thought of chapter 5, no text twice, so that nothing is remembered from the
step before. `--out` writes a CSV file."""
import argparse
import time
from pathlib import Path
from statistics import median

import pandas as pd
import torch

from rsground_nb.data import to_dataset
from rsground_nb.model import student_codec
from rsground_nb.rewards import box_rewards, make_rewards
from rsground_nb.scale import start
from rsground_nb.scenes import scene_records
from rsground_nb.synthesis import synthesise


def seconds(work):
    began = time.process_time()
    work()
    return time.process_time() - began


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--boxes", type=int, default=1_000_000)
    parser.add_argument("--repeats", type=int, default=30)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, help="CSV file, written anew")
    options = parser.parse_args()
    start(options.seed)
    boxes, targets = torch.rand(2, options.boxes, 4, dtype=torch.float64)
    for b in (boxes, targets): b[:, 2:] += b[:, :2]
    table = [dict(what=name, items=options.boxes, unit="boxes a second", value=round(
        options.boxes / median(seconds(lambda: f(boxes, targets, 2.0)) for _ in range(5))))
             for name, f in box_rewards().items()]
    codec, rows = student_codec(), to_dataset(list(scene_records(64 * options.repeats, options.seed)))
    chains = synthesise(rows, codec)[0]
    texts = [c[-1]["content"] if isinstance(c, list) else c for c in chains["completion"]]
    texts = [t if isinstance(t, str) else t[0]["text"] for t in texts]
    texts = [f"{t}{' ' * (k // 64)}" for k, t in enumerate((texts * options.repeats)[:64 * options.repeats])]
    given = dict(box=rows["box"][:64], width=rows["width"][:64], height=rows["height"][:64])
    rewards = make_rewards(codec)
    steps = [seconds(lambda: [f(texts[k:k + 64], **given) for f in rewards])
             for k in range(0, len(texts), 64)]
    table.append(dict(what="three rewards of a step", items=64, unit="ms, median",
                      value=round(1e3 * median(steps), 3)))
    table.append(dict(what="characters of a completion", items=len(texts), unit="median",
                      value=median(map(len, texts))))
    table = pd.DataFrame(table).assign(seed=options.seed, torch=torch.__version__)
    print(table.to_string(index=False))
    if options.out: table.to_csv(options.out, index=False, lineterminator="\n")


if __name__ == "__main__": main()
