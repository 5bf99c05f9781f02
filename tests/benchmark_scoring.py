"""How long scoring takes. From the project's folder, on one core:

    OMP_NUM_THREADS=1 OPENBLAS_NUM_THREADS=1 python tests/benchmark_scoring.py --out FILE

Simulated predictions: 40,000 expressions on 17,402 images. One CSV line per measured call: what, seconds,
peak MB of the process so far, N, images, draws, seed, command."""
import argparse
import csv
import json
import os
import resource
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
from datasets import Dataset

from rsground_nb.scoring import MODES, as_arrays, compare_modes, evaluate_file, load_predictions

WORDS = ["the ship on the left", "the largest tank", "the plane above the red car", "the windmill",
         "the second vehicle from the right"]


def simulated(n, images, seed, side=800):
    """(rows, predictions): objects of 1 % to 50 % of the side, answers off by a sixth of
    the object, 3 % without a box."""
    rng = np.random.default_rng(seed)
    size = side * np.exp(rng.uniform(np.log(0.01), np.log(0.5), (n, 2)))
    corner = rng.uniform(0, 1, (n, 2)) * (side - size)
    true = np.concatenate([corner, corner + size], 1)
    predicted = true + rng.normal(0, 1, (n, 4)) * np.tile(size, 2) / 6
    silent = rng.random(n) < 0.03
    place = np.concatenate([np.arange(images), rng.integers(images, size=n - images)])
    rows = Dataset.from_dict(dict(expression_id=[str(k) for k in range(n)],
                                  image_id=[f"{k:05d}.jpg" for k in place],
                                  expression=[WORDS[k % len(WORDS)] for k in range(n)],
                                  box=true.tolist(), width=[side] * n, height=[side] * n))
    return rows, [dict(expression_id=str(k), predicted=None if silent[k] else box)
                  for k, box in enumerate(predicted.tolist())]


def timed(what, call, *arguments, **named):
    start = time.perf_counter()
    call(*arguments, **named)
    seconds = time.perf_counter() - start
    return dict(what=what, seconds=round(seconds, 2),
                peak_mb=round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024))


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", help="append the lines to this CSV file as well")
    for name, value in (("n", 40_000), ("images", 17_402), ("draws", 1000), ("seed", 0)):
        parser.add_argument(f"--{name}", type=int, default=value)
    options = parser.parse_args()
    rows, found = simulated(options.n, options.images, options.seed)
    threads = " ".join(f"{name}={os.environ[name]}"
                       for name in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS") if name in os.environ)
    common = dict(N=options.n, images=options.images, draws=options.draws, seed=options.seed,
                  command=f"{threads} python tests/benchmark_scoring.py".strip())
    arrays = as_arrays(found, rows)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "predictions.jsonl"
        path.write_text("".join(json.dumps(p) + "\n" for p in found))
        lines = [timed(f"compare_modes, {len(MODES)} modes", compare_modes, *arrays, seed=options.seed,
                       draws=options.draws), timed("load_predictions", load_predictions, path, rows),
                 timed(f"evaluate_file: load, {len(MODES)} modes, strata", evaluate_file, path, rows,
                       seed=options.seed, draws=options.draws)]
    new = options.out is None or not Path(options.out).exists()
    for target in [sys.stdout] + ([open(options.out, "a", newline="", encoding="utf-8")] if options.out
                                  else []):
        writer = csv.DictWriter(target, [*lines[0], *common], lineterminator="\n")
        if target is sys.stdout or new: writer.writeheader()
        writer.writerows({**line, **common} for line in lines)
        target.flush()


if __name__ == "__main__":
    main()
