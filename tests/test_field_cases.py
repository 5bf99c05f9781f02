"""Inputs in shapes that people meet, with the right result of each (shared data,
field_cases/cases.jsonl): one test for each kind."""
import json

import numpy as np
import pytest

from conftest import SHARED
from rsground_nb.shapes import decode_mask
from rsground_nb.data import load_folder
from rsground_nb.doctor import examine

FIELD = SHARED / "data" / "field_cases"
CASES = ([json.loads(line) for line in (FIELD / "cases.jsonl").read_text().splitlines()] if FIELD.is_dir()
         else [])


def of_kind(kind): return [pytest.param(c, id=c["id"]) for c in CASES if c["kind"] == kind]


@pytest.mark.parametrize("case", of_kind("dataset"))
def test_a_dataset_is_read_as_people_mean_it(shared, case):
    name, expected, near = case["input"], case["expected"], case.get("tolerance", 1e-9)
    report, (splits, findings) = examine(FIELD / name), load_folder(FIELD / name)
    rows = [row for split in splits.values() for row in split]
    said = [f.message for f in findings]
    if "finding" in expected:
        assert (any(expected["finding"] in text for text in said)
                and any(expected["finding"] in f.message for f in report.findings)), said
    if "rows" in expected: assert len(rows) == len(report.rows) == expected["rows"], said
    if "box" in expected: assert rows[0]["box"] == pytest.approx(expected["box"], abs=near)
    if "polygon" in expected: assert rows[0]["polygon"] == pytest.approx(expected["polygon"], abs=near)
    if "category" in expected: assert rows[0]["category"] == expected["category"]
    if "mask" in expected: assert rows[0]["mask"] == expected["mask"]
    if name in ("coco_polygon_and_point", "yolo_segments"): assert decode_mask(rows[0]["mask"]).any()
    if "same_frame" in expected and not report.findings:
        assert rows[0]["image"].size == (rows[0]["width"], rows[0]["height"])
    if "not_flat" in expected and not report.findings:
        assert len(np.unique(np.asarray(rows[0]["image"].convert("L")))) >= 100
