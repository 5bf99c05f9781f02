"""How long do questions about 1,000 pictures with 6,000 boxes take, and is a picture opened?
Writes tests/benchmark_refer.csv.

    python tests/benchmark_refer.py [--out FILE] [--pictures 1000] [--boxes 6]

The dataset (COCO, 600 x 600, one or two categories a picture, boxes of 12 to 120 px) is made here, in a
temporary place: one JPEG under many names. Each measurement is a process of its own, on one core. Seconds are
processor time: reading the annotation, asking, writing the folder.
"""
import argparse
import json
import os
import tempfile
from pathlib import Path

import numpy as np
from PIL import Image

from benchmark_data import measured, write_rows

PROGRAM = """
import json, sys, time
import PIL.Image
opened, real = [], PIL.Image.open
PIL.Image.open = lambda *a, **k: opened.append(a[0]) or real(*a, **k)
from rsground_nb.refer import write_refer
began = time.process_time()
rows, refused, _ = write_refer(sys.argv[1], sys.argv[2], [int(w) for w in sys.argv[3:]])
seconds = time.process_time() - began
hops = {f"hops {n}": sum(r["hops"] == n for r in rows) for n in (1, 2, 3)}
print(json.dumps(dict(seconds=round(seconds, 1), sentences=len(rows), **hops, images_opened=len(opened),
                      refused_by_the_checker=refused["sentence that the checker does not confirm"])))
"""


def make_folder(root, pictures, boxes):
    """A COCO folder of square pictures with that many boxes each."""
    rng = np.random.default_rng(0)
    (root / "train").mkdir(parents=True)
    first = root / "train" / "0.jpg"
    Image.fromarray(rng.integers(0, 255, (600, 600, 3), dtype=np.uint8)).save(first)
    for k in range(1, pictures): os.link(first, root / "train" / f"{k}.jpg")
    def box():
        w, h = np.exp(rng.uniform(np.log(12), np.log(120), 2))
        return [round(float(v), 1) for v in (*rng.uniform(3, 477, 2), w, h)]
    annotations = [dict(id=boxes * k + j, image_id=k, category_id=int(rng.integers(1 + k % 2)), bbox=box())
                   for k in range(pictures) for j in range(boxes)]
    whole = dict(images=[dict(id=k, file_name=f"{k}.jpg", width=600, height=600) for k in range(pictures)],
                 categories=[dict(id=0, name="plane"), dict(id=1, name="large-vehicle")],
                 annotations=annotations)
    (root / "train" / "_annotations.coco.json").write_text(json.dumps(whole))


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--out", default=str(Path(__file__).with_suffix(".csv")))
    parser.add_argument("--pictures", type=int, default=1000)
    parser.add_argument("--boxes", type=int, default=6)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as d:
        make_folder(Path(d) / "coco", args.pictures, args.boxes)
        rows = []
        for windows in ((), ("300",)):
            found = measured(PROGRAM, f"{d}/coco", f"{d}/out{len(windows)}", *windows)
            rows.append(dict(windows=" ".join(windows) or "none", pictures=args.pictures, boxes=args.pictures
                             * args.boxes, **found, command="python tests/benchmark_refer.py"))
    write_rows(rows, args.out)


if __name__ == "__main__":
    main()
