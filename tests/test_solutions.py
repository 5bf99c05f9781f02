"""The solutions: the same checks as in the chapters, run from top to bottom, and every one says right. (That
an unanswered exercise says so is asked in test_run.py.)"""
import ast

import nbformat
import papermill
import pytest

from conftest import ROOT, said_by_checks

SOLUTIONS = sorted((ROOT / "nbs" / "solutions").glob("*.ipynb"))


def chapter_of(path): return next(p for p in (ROOT / "nbs").rglob(path.name) if p.parent.name != "solutions")


def cells(path, tag):
    return [c.source for c in nbformat.read(path, as_version=4).cells if tag in c.metadata.get("tags", [])]


@pytest.mark.parametrize("path", SOLUTIONS, ids=lambda p: p.stem)
def test_the_checks_are_the_chapters_own(path):
    chapter = nbformat.read(chapter_of(path), as_version=4)
    assert cells(path, "check") == cells(chapter_of(path), "check")
    assert len(cells(path, "check")) >= dict(shapes=2, weightings=2, prompts=1, masks=1).get(path.stem, 3)
    assert set(cells(path, "chapter")) <= {c.source for c in chapter.cells}


@pytest.mark.parametrize("path", SOLUTIONS, ids=lambda p: p.stem)
def test_every_solution_is_right(path, tmp_path):
    done = papermill.execute_notebook(path, tmp_path / path.name, kernel_name="python3", cwd=tmp_path,
                                      progress_bar=False)
    assert set(said_by_checks(done)) == {"'right'"}
    refused = [ast.literal_eval(said) for said in said_by_checks(done, "refused")]
    assert len(refused) == len(cells(path, "check"))
    for said in refused: assert len(said) >= 3 and all(s.startswith("wrong: ") for s in said), said
