"""How long the course takes: minutes of reading each chapter and of running its cells.

    rsground run --out RUN && python tests/course_minutes.py RUN      writes tests/course_minutes.csv

Reading: the words of the text cells, 200 a minute. Running: as `run.json` of the finished run says.
"""
import json
import sys
from pathlib import Path

import nbformat
import pandas as pd

from rsground_nb.run import COURSE, notebooks_folder

TABLE, WORDS_A_MINUTE = Path(__file__).parent / "course_minutes.csv", 200


def words(name):
    """Words in the text cells of a chapter."""
    cells = nbformat.read(notebooks_folder() / f"{name}.ipynb", as_version=4).cells
    return sum(len(c.source.split()) for c in cells if c.cell_type == "markdown")


def course_minutes(seconds):
    """One row per chapter of the course; `seconds`: chapter -> seconds that its cells ran, where known."""
    table = pd.DataFrame(index=pd.Index(COURSE, name="chapter"))
    table["reading"] = [words(name) / WORDS_A_MINUTE for name in COURSE]
    table["running"] = [seconds.get(name, float("nan")) / 60 for name in COURSE]
    return table.round(1)


if __name__ == "__main__":
    run = json.loads((Path(sys.argv[1]) / "run.json").read_text(encoding="utf-8"))
    course_minutes(run["chapters"]).to_csv(TABLE)
