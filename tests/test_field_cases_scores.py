"""The completions and scorers of field_cases: cases from the field, each with its right value."""
import json

import numpy as np
import pytest

from conftest import SHARED
from rsground_nb.boxes import parse_completion
from rsground_nb.scoring import compare_modes

FILE = SHARED / "data" / "field_cases" / "cases.jsonl"
CASES = [json.loads(line) for line in FILE.read_text(encoding="utf-8").splitlines()] if FILE.is_file() else []


def of_kind(kind):
    found = [c for c in CASES if c["kind"] == kind]
    return pytest.mark.parametrize("case", found or [None], ids=[c["id"] for c in found] or ["no data"])


@of_kind("completion")
def test_a_completion_means_this_box(shared, case):
    box, reason, *_ = parse_completion(case["input"])
    assert (box and list(box)) == case["expected"] and (reason == "ok") == (box is not None)


@of_kind("scorer")
def test_a_mode_says_what_the_original_says(shared, case):
    given, none = case["input"], [np.nan] * 4
    row = compare_modes([given["predicted"] or none], [given["true"]], [given["width_height"]], ["a"],
                        [given["mode"]], draws=2).iloc[0]
    if given["predicted"] is not None: assert row.meanIoU == pytest.approx(case["expected"], abs=1e-3)
    else:  # a row without an answer: cumIoU is that of the other rows
        assert np.isnan(row.cumIoU)
        two = compare_modes([none, [0, 0, 256, 256]], [given["true"], [0, 0, 256, 256]],
                            [given["width_height"]] * 2, ["a", "b"], [given["mode"]], draws=2).iloc[0]
        assert two.cumIoU == pytest.approx(1, abs=1e-3) and two.meanIoU == pytest.approx(0.5, abs=1e-3)
