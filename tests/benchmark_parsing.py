"""How many completions a second does the parser read, and what comes out of them?

    python tests/benchmark_parsing.py [--count 100000] [--seed 0] [--out FILE]

The completions are made up: random characters, and good completions with characters deleted, doubled, swapped
or replaced, with odd numbers, cut off, or joined. `--out` adds a row to a CSV file."""
import argparse
import csv
import random
import re
import time
from collections import Counter
from pathlib import Path

from rsground_nb.boxes import GRID, Codec, parse_completion

CODECS = [Codec(name) for name in ("pixel", "qwen2_5_vl", *GRID)]
PIECES = [*"[](){}<>|,.:-+0123456789eE \n\"'１２，［］−\u0301\u0316\ufdfa\ud800²", "<think>", "</think>",
          "<answer>", "</answer>", '{"bbox_2d": [', "```json", "NaN", "Infinity", "1e400", "9" * 400,
          "[1, 2, 3, 4]"]
NUMBERS = ["NaN", "-Infinity", "1e400", "9" * 400, "-3", "4.5", "７", "null", "0"]


def good(rng):
    "A completion with a box in the notation of some family, sometimes with prose around it."
    x, y, width, height = (rng.uniform(*limits) for limits in ((0, 700), (0, 700), (1, 100), (1, 100)))
    codec = rng.choice(CODECS)
    angle = rng.randint(-90, 90) if GRID.get(codec.name) == 100 and rng.random() < 0.5 else None
    return (f"<think>Near ({x:.0f}, {y:.0f}).</think>"
            f"<answer>{rng.choice(['', 'It is here: '])}"
            f"{codec.write((x, y, x + width, y + height), 800, 800, angle)}</answer>")


def mutated(rng, text):
    "The text after one to eight small accidents."
    for _ in range(rng.randint(1, 8)):
        k, other = sorted(rng.randrange(len(text) + 1) for _ in range(2))
        kind = rng.randrange(5)
        if kind == 0: text = text[:k] + text[k + 1:]
        elif kind == 1: text = text[:k] + text[k:k + 1] + text[k:]
        elif kind == 2:
            text = text[:k] + text[other:other + 1] + text[k + 1:other] + text[k:k + 1] + text[other + 1:]
        elif kind == 3: text = text[:k] + rng.choice(PIECES) + text[k + 1:]
        else: text = text[:k] + re.sub(r"[0-9]+", rng.choice(NUMBERS), text[k:], count=1)
    return text


def completions(count, seed):
    """`count` completions, the same for the same seed: a fifth each good, mutated, cut off,
    joined and mutated, random."""
    rng = random.Random(seed)
    for k in range(count):
        text = good(rng)
        if k % 5 == 1: text = mutated(rng, text)
        elif k % 5 == 2: text = text[:rng.randrange(len(text))]
        elif k % 5 == 3: text = mutated(rng, text + good(rng))
        elif k % 5 == 4:
            text = "".join(rng.choice(PIECES) if rng.random() < 0.7 else chr(rng.randrange(0x110000))
                           for _ in range(rng.randint(0, 60)))
            if rng.random() < 0.5: text = f"<answer>{text}</answer>"
        yield text


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--count", type=int, default=100_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, help="CSV file that gets one more row")
    options = parser.parse_args()
    texts = list(completions(options.count, options.seed))
    start = time.perf_counter()
    reasons = [parse_completion(text).reason for text in texts]
    seconds = time.perf_counter() - start
    for reason, number in Counter(reasons).most_common(): print(f"{number:8,}  {reason}")
    print(f"{options.count:,} completions ({sum(map(len, texts)):,} characters) in {seconds:.2f} s: "
          f"{options.count / seconds:,.0f} a second")
    if options.out:
        row = dict(what="parse_completion", count=options.count, seconds=round(seconds, 3),
                   per_second=round(options.count / seconds),
                   command=f"python tests/benchmark_parsing.py --count {options.count} --seed {options.seed}",
                   seed=options.seed)
        options.out.parent.mkdir(parents=True, exist_ok=True)
        new = not options.out.exists()
        with options.out.open("a", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, row)
            if new: writer.writeheader()
            writer.writerow(row)


if __name__ == "__main__": main()
