"""How many Thoughts a second does the rule teacher make and tell, how many do the filters judge, are all
kept, and which planted defects are found?

    python tests/benchmark_chains.py [--count 2000] [--seed 0] [--out FILE] [--planted FILE]

Rows are scenes with all kinds of sentences, a third of one, two and three hops each: 70 % of style simple, 10
% aerial, 20 % other; their pictures are not drawn. Parsing the sentences is part of the writing. `--out`
writes a CSV file with one row for each number of hops, `--planted` one with a row for each planted defect."""
import argparse
import gc
import time
from importlib.metadata import version
from pathlib import Path

import numpy as np
import pandas as pd
from PIL import Image
from planting import judged, scores

from rsground_nb import scenes
from rsground_nb.boxes import Codec
from rsground_nb.cot import rule_drafts
from rsground_nb.data import to_dataset
from rsground_nb.filters import find_faults, verdict
from rsground_nb.grammar import parse_expression
from rsground_nb.loading import ASSETS, load_processor
from rsground_nb.run import commit

GRID = Codec("qwen3_vl")


def seconds_of(work):
    "(seconds of the processor, what `work()` gave)."
    began = time.process_time()
    result = work()
    return time.process_time() - began, result


def measure(records, tokenizer):
    "One row of the table: speeds (median of 5), kept rows, tokens of a chain."
    rows, times = to_dataset(records), []
    gc.collect(); gc.freeze()  # the collector need not walk the libraries
    for _ in range(5):
        parse_expression.cache_clear()
        written, drafts = seconds_of(lambda: rule_drafts(rows, GRID))
        read, found = seconds_of(lambda: [verdict(find_faults(d.completion, r, GRID, thought=d.thought))
                                          for d, r in zip(drafts, records)])
        times.append((written, read))
    written, read = np.median(times, axis=0)
    tokens = [len(tokenizer.tokenize(d.completion)) + 1 for d in drafts]
    return dict(rows=len(records), kept=found.count("ok"), written_per_second=round(len(records) / written),
                judged_per_second=round(len(records) / read), tokens=round(np.mean(tokens), 1),
                longest=max(tokens))


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--count", type=int, default=2000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, help="CSV file, replaced")
    parser.add_argument("--planted", type=Path, help="CSV file, replaced")
    options = parser.parse_args()
    about = dict(command=f"python tests/benchmark_chains.py --count {options.count} --seed {options.seed}",
                 commit=commit(), versions=f"datasets {version('datasets')} numpy {version('numpy')}")
    scenes.draw_scene = lambda scene, rng: Image.new("RGB", (2, 2))
    records = [r for style, share in (("simple", 0.7), ("aerial", 0.1), ("other", 0.2))
               for r in scenes.scene_records(round(share * options.count), options.seed, style=style,
                                             hops=(1, 2, 3))]
    tokenizer = load_processor(str(ASSETS / "tiny"), 112 * 112).tokenizer
    groups = {"all": records, **{str(k): [r for r in records if r["hops"] == k] for k in (1, 2, 3)},
              "simple": records[:round(0.7 * options.count)]}
    table = pd.DataFrame([dict(hops=name, **measure(group, tokenizer), **about)
                          for name, group in groups.items()])
    truth, found, _ = judged(records, GRID, np.random.default_rng(options.seed))
    planted = pd.DataFrame([dict(defect=name, planted=n, found=m,
                                 recall=round(recall, 3), precision=round(precision, 3), **about)
                            for name, (n, m, recall, precision) in scores(truth, found).items()])
    print(table.drop(columns=list(about)).to_string(index=False),
          planted.drop(columns=list(about)).to_string(index=False), sep="\n\n")
    if options.out: table.to_csv(options.out, index=False)
    if options.planted: planted.to_csv(options.planted, index=False)


if __name__ == "__main__": main()
