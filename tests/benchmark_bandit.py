"""The sweeps of the chapter on the bandit: what the scaling of rewards, beta, the start, the learning rate,
the optimiser and the size of the group change. From the project's folder, on one core (about two minutes):

    OMP_NUM_THREADS=1 python tests/benchmark_bandit.py --out tests/benchmark_bandit.csv

One CSV line per experiment, setting, reward and start: the greedy box's IoU at the end with a 95 % interval
over 20 seeds; `gain`, the paired difference to IoU only under the same setting in the mean IoU over all
steps, with its interval; side and miss in target widths. Learning rates of `own learning rate` are chosen on
20 other seeds by the mean IoU at the end over the four starts."""
import argparse
import csv
import math
import sys
from contextlib import nullcontext

import torch

from rsground_nb.bandit import TARGET, interval, to_boxes, train_policies, weighted
from rsground_nb.rewards import ious

L = math.log(3)
STARTS = {"near": (0.5, 0, 0, 0), "middle": (2, 0, 0, 0), "far": (5, 0, 0, 0), "very far": (10, 0, 0, 0)}
SIZES = {"3 times too large": (0, 0, L, L), "3 times too small": (0, 0, -L, -L),
         "too wide and too flat": (0, 0, L, -L)}
THIRD = ("center", "area", "distance", "giou", "diou")
PLUS = {"iou": {"iou": 1}, "binary": {"binary": 1}, **{f"iou + 0.1 {n}": {"iou": 1, n: 0.1} for n in THIRD}}


def lines(experiment, rewards, starts, seeds, **options):
    """One dict per reward and start. `rewards`: name -> (weights, alpha); the first one is what
    the others are compared with."""
    base, found = None, []
    for name, (weights, alpha) in rewards.items():
        means, spreads = train_policies(weighted(weights, alpha),
                                        torch.tensor(list(starts.values()), dtype=torch.float64), seeds,
                                        **options)
        curve, end = ious(to_boxes(means), TARGET), means[:, :, -1]
        base = curve.mean(-1) if base is None else base
        iou, gain = interval(curve[:, :, -1]), interval(curve.mean(-1) - base)
        for k, start in enumerate(starts):
            third = [n for n in weights if n != "iou"]
            found.append(dict(experiment=experiment, reward=name,
                              beta=weights[third[0]] if third and "iou" in weights else "",
                              alpha=alpha, scale_rewards=options.get("scale_rewards", "group"),
                              optimizer=options.get("optimizer", "natural"),
                              learning_rate=options.get("learning_rate", 0.2),
                              num_generations=options.get("num_generations", 8),
                              spread="learned" if options.get("learn_spread", True) else "fixed", start=start,
                              seeds=len(seeds), steps=means.shape[2] - 1,
                              **dict(zip(("iou", "iou_low", "iou_high"), iou[:, k].tolist())),
                              **dict(zip(("gain", "gain_low", "gain_high"), gain[:, k].tolist())),
                              side=end[:, k, 2:].mean().exp().item(),
                              miss=end[:, k, :2].norm(dim=-1).mean().item()))
    return found


def plain(trials): return {name: (weights, 2.5) for name, weights in trials.items()}


def sweep(seeds, others):
    """All experiments, as dicts."""
    several = plain({"iou": {"iou": 1}, **{f"iou + {b:g} {n}": {"iou": 1, n: b} for n, b in (
        ("center", 0.01), ("center", 0.1), ("center", 1), ("area", 0.1), ("distance", 0.1), ("distance", 1),
        ("giou", 0.1), ("diou", 0.1))}})
    for way in ("group", "batch", "none"):
        for rate in (0.2, 1.0, 5.0, 20.0):
            yield from lines("scaling", several, STARTS, seeds, scale_rewards=way, learning_rate=rate)
    weights = {"iou": {"iou": 1}, **{f"iou + {b:g} {n}": {"iou": 1, n: b} for n in THIRD for b in (0.1, 1)}}
    for learn in (True, False): yield from lines("sizes", plain(weights), SIZES, seeds, learn_spread=learn)
    for beta in (0.1, 1, 3, 10, 30, 100):
        yield from lines("beta", plain({f"iou + beta {n}": {"iou": 1, n: beta}
                                        for n in ("center", "area", "distance", "giou")}),
                         {"near": STARTS["near"]}, seeds)
    every = plain(PLUS) | {f"iou + 0.1 center, alpha {a}": ({"iou": 1, "center": 0.1}, a) for a in (5, 10)}
    for optimizer, rates in (("natural", (0.05, 0.1, 0.2, 0.4)), ("adam", (0.02, 0.05, 0.1, 0.2))):
        tried = {rate: lines("learning rate", every, STARTS, others, optimizer=optimizer, learning_rate=rate)
                 for rate in rates}
        for name, trial in every.items():
            rate = max(rates, key=lambda r: sum(line["iou"] for line in tried[r] if line["reward"] == name))
            yield from lines("own learning rate", {name: trial}, STARTS, seeds, optimizer=optimizer,
                             learning_rate=rate)
        for rate in rates:
            yield from lines("learning rate", every, STARTS, seeds, optimizer=optimizer, learning_rate=rate)
    few = plain({n: PLUS[n] for n in ("iou", "iou + 0.1 center", "iou + 0.1 distance")})
    for size in (2, 4, 8, 16, 32): yield from lines("group size", few, STARTS, seeds, num_generations=size)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", help="write the lines to this CSV file")
    options = parser.parse_args()
    torch.set_num_threads(1)
    with (open(options.out, "w", newline="", encoding="utf-8") if options.out
          else nullcontext(sys.stdout) as target):
        writer = None
        for line in sweep(range(20), range(100, 120)):
            if writer is None:
                writer = csv.DictWriter(target, line, lineterminator="\n")
                writer.writeheader()
            writer.writerow({k: round(v, 4) if isinstance(v, float) else v for k, v in line.items()})
            target.flush()


if __name__ == "__main__":
    main()
