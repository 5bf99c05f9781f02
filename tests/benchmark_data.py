"""How long does a folder of the size of DIOR-RSVG take to load, and how much memory?
Writes tests/benchmark_data.csv.

    python tests/benchmark_data.py [--out FILE] [--files 23463] [--expressions 38320]

The folder is made here, in a temporary place: XML files of the real shape, and one small image under many
names. Each measurement is a process of its own, on one core. The files were just written, so they are in the
page cache: "cold" means without our own cache, not with a cold disk.
"""
import argparse
import csv
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

from PIL import Image

PROGRAM = """
import json, os, resource, sys, time
import PIL.Image
opened, real = [], PIL.Image.open
PIL.Image.open = lambda *a, **k: opened.append(a[0]) or real(*a, **k)
from rsground_nb.data import load_folder
began = time.perf_counter()
splits, findings = load_folder(sys.argv[1], cache=sys.argv[2])
seconds = time.perf_counter() - began
peak = round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024)
print(json.dumps(dict(seconds=round(seconds, 2), peak_mb=peak, rows=sum(map(len, splits.values())),
                      images_opened=len(opened))))
"""


def make_folder(root, files, expressions):
    """A folder in the DIOR-RSVG layout: `expressions` objects spread over `files` annotation files, indices
    dealt out 70/10/20 in turn."""
    for part in ("Annotations", "JPEGImages"): (root / part).mkdir(parents=True)
    first = root / "JPEGImages" / "00001.jpg"
    Image.new("RGB", (800, 800), "grey").save(first)
    for k in range(files):
        name = f"{k + 1:05d}"
        if k: os.link(first, root / "JPEGImages" / f"{name}.jpg")
        objects = "".join("<object><name>ship</name><pose>Unspecified</pose><bndbox>"
                          f"<xmin>{10 + 30 * j}</xmin><ymin>{20 + 40 * j}</ymin><xmax>{110 + 30 * j}</xmax>"
                          f"<ymax>{90 + 40 * j}</ymax></bndbox>" f"<description>The ship number {j} on the "
                          f"lower left of the long bridge in picture {name}</description></object>\n"
                          for j in range(expressions // files + (k < expressions % files)))
        (root / "Annotations" / f"{name}.xml").write_text(
            f"<annotation><filename>{name}.jpg</filename><source><database>DIOR</database></source><size>"
            "<width>800</width><height>800</height><depth>3</depth></size><segmented>0</segmented>\n"
            f"{objects}</annotation>")
    shares = {"train": range(0, 7), "val": range(7, 8), "test": range(8, 10)}
    for split, tenths in shares.items():
        (root / f"{split}.txt").write_text("".join(f"{n}\n" for n in range(expressions) if n % 10 in tenths))


def measured(program, *words):
    """What a program that counts opened images prints, in a process of its own."""
    done = subprocess.run([sys.executable, "-c", program, *words], capture_output=True, text=True, check=True,
                          env={**os.environ, "OMP_NUM_THREADS": "1"})
    return json.loads(done.stdout)


def write_rows(rows, out):
    """Write a CSV file, and print it."""
    with open(out, "w", newline="") as file:
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        writer.writerows(rows)
    print(open(out).read())


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--out", default=str(Path(__file__).with_suffix(".csv")))
    parser.add_argument("--files", type=int, default=23463)
    parser.add_argument("--expressions", type=int, default=38320)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as d:
        make_folder(Path(d) / "dior", args.files, args.expressions)
        rows = []
        for what in ("cold", "from the cache"):
            found = measured(PROGRAM, f"{d}/dior", f"{d}/cache")
            rows.append(dict(what=f"load_folder, {what}", files=args.files, expressions=args.expressions,
                             **found, command="python tests/benchmark_data.py"))
    write_rows(rows, args.out)


if __name__ == "__main__":
    main()
