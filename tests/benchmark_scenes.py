"""Seconds for 1,000 full records (scene, sentence, drawing, mask, oriented box, PNG) of each
style, on one core. Not a test.

    python tests/benchmark_scenes.py [--count 1000] [--side 128] [--seed 0] [--out FILE]
"""
import os

os.environ["OMP_NUM_THREADS"] = "1"  # before numpy is loaded

import argparse
import csv
import sys
import time

from rsground_nb.scenes import STYLES, scene_records


def measure(style, count, side, seed):
    list(scene_records(5, seed, side, style=style))  # warm up
    wall, cpu = time.perf_counter(), time.process_time()
    rows = list(scene_records(count, seed, side, style=style))
    return len(rows), time.perf_counter() - wall, time.process_time() - cpu


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--count", type=int, default=1000, help="records of each style")
    parser.add_argument("--side", type=int, default=128, help="pixels")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", help="also write the table to this CSV file")
    asked = parser.parse_args()
    command = (f"python tests/benchmark_scenes.py --count {asked.count} --side {asked.side} "
               f"--seed {asked.seed}")
    table = [("what", "seconds", "cpu_seconds", "command", "seed")]
    for style in STYLES:
        made, wall, cpu = measure(style, asked.count, asked.side, asked.seed)
        table.append((f"{made} records of style {style}, {asked.side} px", f"{wall:.2f}", f"{cpu:.2f}",
                      command, asked.seed))
    csv.writer(sys.stdout, lineterminator="\n").writerows(table)
    if asked.out:
        with open(asked.out, "w", newline="", encoding="utf-8") as f:
            csv.writer(f, lineterminator="\n").writerows(table)


if __name__ == "__main__": main()
