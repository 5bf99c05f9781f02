"""Choose the real crops of the package and write them to rsground_nb/assets/real: python
tests/make_real_samples.py AERIAL_PLANES

Only pictures of the test split whose entry says "Public Domain" are taken: the test split is never trained
on, and these pictures may be shipped.
"""
import json
import sys
from collections import Counter
from pathlib import Path

from rsground_nb.refer import as_line, image_name, put_images, read_detections, refer

TARGET = Path(__file__).resolve().parent.parent / "rsground_nb" / "assets" / "real"
MOST, SIDES = 40, (96, 112, 128, 160, 192)
LEAST, CROWD = 0.18, 8  # the target's longer side as a share of the window's; planes in a window

LICENSE = """# Where these pictures come from

{count} crops of {small} to {large} px of {pictures} aerial pictures, with boxes people drew \
and sentences made by
`rsground data refer`. The plane that is asked for takes at least {least:.0%} of the side: \
the tiny model sees 7 by 7 cells.

The pictures are entries of the data set "aerial_planes" with source "{source}" and license \
"{license}". They were taken from an export
(github.com/bryceag11/yolov5_obb at 5219534, dataset/roboflow) whose README states Public Domain; \
that statement is all that the licence rests on.
The crops come from the test split, are never used for training, and are saved as JPEG again. \
Pictures: {names}.
"""


def public_domain(folder):
    """(source, license, file names) of the pictures of the test split that may be shipped."""
    whole = json.loads((folder / "test" / "_annotations.coco.json").read_text(encoding="utf-8"))
    allowed = {k["id"] for k in whole["licenses"] if k["name"] == "Public Domain"}
    chosen = [i for i in whole["images"] if i["license"] in allowed and i["source"] == "GDIT Aerial Airport"]
    return "GDIT Aerial Airport", "Public Domain", {i["file_name"] for i in chosen}


def choose_rows(rows, count):
    """`count` rows: hops in turn, always of the picture and rule that were taken least often so far."""
    taken, pictures, rules = [], Counter(), Counter()
    while len(taken) < count:
        wanted = [r for r in rows if r["hops"] == len(taken) % 3 + 1 and r not in taken]
        best = min(wanted, key=lambda r: (rules[r["source"]], pictures[r["image_id"]], r["expression_id"]))
        taken.append(best)
        pictures[best["image_id"]] += 1; rules[best["source"]] += 1
    return taken


def can_be_seen(row):
    """Is the target large enough for the tiny model's cells, and the crop not crowded?"""
    x1, y1, x2, y2 = row["box"]
    return max(x2 - x1, y2 - y1) >= LEAST * row["width"] and len(row["objects"]) <= CROWD


def main(folder):
    source, license, names = public_domain(folder)
    found, _ = read_detections(folder / "test" / "_annotations.coco.json", "coco", folder / "test")
    rows, _ = refer([dict(r, split="test") for r in found if r["image_id"] in names], SIDES, seed=0)
    rows = choose_rows([r for r in rows if r["window"] and can_be_seen(r)], MOST)
    TARGET.mkdir(exist_ok=True)
    for old in TARGET.iterdir(): old.unlink()
    put_images(rows, TARGET)   # below images/test, then beside the rows: package data lie in one folder
    flat = {image_name(r): Path(image_name(r)).name for r in rows}
    for name, short in flat.items(): (TARGET / name).rename(TARGET / short)
    (TARGET / "images" / "test").rmdir(); (TARGET / "images").rmdir()
    (TARGET / "test.jsonl").write_text("".join(as_line(r, flat[image_name(r)]) for r in rows),
                                       encoding="utf-8")
    pictures, widths = sorted({r["image_id"] for r in rows}), [r["width"] for r in rows]
    (TARGET / "LICENSE.md").write_text(LICENSE.format(count=len(rows), pictures=len(pictures), small=min(
        widths), large=max(widths), least=LEAST, source=source, license=license, names=", ".join(pictures)),
                                       encoding="utf-8")
    print(f"{len(rows)} crops, {sum(p.stat().st_size for p in TARGET.iterdir()):,} bytes, hops "
          f"{dict(Counter(r['hops'] for r in rows))}, {dict(Counter(r['source'] for r in rows))}")


if __name__ == "__main__": main(Path(sys.argv[1]))
