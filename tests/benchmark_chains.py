"""How many chains a second does the rule teacher write, how many do the filters read, and how many are kept?

    python tests/benchmark_chains.py [--count 2000] [--repeats 5] [--seed 0] [--out FILE]

Rows are scenes of each style, all different; their pictures are not drawn. Parsing the sentences is part of the writing. `--out` writes a CSV file with one row for each style and convention."""
import argparse
import csv
import time
from collections import Counter
from importlib.metadata import version
from pathlib import Path
from statistics import median

from PIL import Image

from rsground_nb import scenes
from rsground_nb.boxes import Codec
from rsground_nb.cot import rule_drafts
from rsground_nb.data import to_dataset
from rsground_nb.filters import find_faults, verdict
from rsground_nb.run import commit

CODECS = (Codec("qwen2_5_vl", max_pixels=112 * 112), Codec("qwen3_vl"))


def seconds_of(work):
    "(seconds on the clock, what `work()` gave)."
    began = time.perf_counter()
    result = work()
    return time.perf_counter() - began, result


def measure(style, codec, count, repeats, seed):
    "One row of the table: medians over the repeats, every repeat with a seed of its own."
    scenes.draw_scene = lambda scene, rng: Image.new("RGB", (2, 2))
    writing, reading, verdicts = [], [], Counter()
    for k in range(repeats):
        rows = to_dataset(list(scenes.scene_records(count, seed + k, style=style)))
        plain = list(rows.remove_columns("image"))
        seconds, drafts = seconds_of(lambda: rule_drafts(rows, codec, seed + k))
        writing.append(count / seconds)
        seconds, found = seconds_of(lambda: [verdict(find_faults(d.completion, r, codec)) for d, r in zip(drafts, plain)])
        reading.append(count / seconds)
        verdicts.update(found)
    return dict(style=style, codec=codec.name, rows=count * repeats, kept=verdicts["ok"], written_per_second=round(median(writing)), slowest=round(min(writing)), fastest=round(max(writing)), judged_per_second=round(median(reading)))


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--count", type=int, default=2000)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, help="CSV file, replaced")
    options = parser.parse_args()
    about = dict(command=f"python tests/benchmark_chains.py --count {options.count} --repeats {options.repeats} --seed {options.seed}", seed=options.seed, commit=commit(), versions=f"datasets {version('datasets')} numpy {version('numpy')}")
    table = []
    for style in scenes.STYLES:
        for codec in CODECS:
            table.append({**measure(style, codec, options.count, options.repeats, options.seed), **about})
            print(", ".join(f"{k} {v}" for k, v in table[-1].items() if k not in about), flush=True)
    if options.out:
        with options.out.open("w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, table[0])
            writer.writeheader()
            writer.writerows(table)


if __name__ == "__main__": main()
