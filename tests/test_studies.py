"""Many small trainings: each run once, resumed after a kill, faults named; the effect of an arm by hand."""
import os
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
from hypothesis import given, strategies as st

from rsground_nb.ablation import effect, verdict
from rsground_nb.boxes import parse_completion
from rsground_nb.studies import arm_ious, box_only_reward, run_all, run_id

WORK = '''
import os, time
from pathlib import Path
def work(run, folder):
    with open(folder / "calls.txt", "a") as f: f.write(f"{run['number']}\\n")
    if run["number"] == 3 and not (folder / "go").exists(): time.sleep(600)
    return dict(half=run["number"] / run.get("by", 2))
'''


@pytest.fixture
def work(tmp_path, monkeypatch):
    (tmp_path / "studied.py").write_text(WORK)
    monkeypatch.syspath_prepend(str(tmp_path))
    import studied
    yield studied.work
    del sys.modules["studied"]


def calls(folder): return sorted((folder / "calls.txt").read_text().split())


def test_a_killed_study_makes_only_the_missing_runs_and_a_failed_run_is_named(work, tmp_path):
    folder, runs = tmp_path / "runs", [dict(number=n) for n in (1, 2, 3)]
    script = ("import studied; from rsground_nb.studies import run_all\n"
              f"if __name__ == '__main__': run_all(studied.work, {runs}, {str(folder)!r})")
    (tmp_path / "script.py").write_text(script)
    before = subprocess.Popen([sys.executable, "script.py"], cwd=tmp_path, start_new_session=True)
    try:
        while not (folder / "calls.txt").exists() or calls(folder) != ["1", "2", "3"]:
            assert before.poll() is None
            time.sleep(0.2)
        while len([*folder.glob("*.json")]) < 2: time.sleep(0.2)
    finally:
        os.killpg(before.pid, signal.SIGKILL)
        before.wait()
    (folder / "go").touch()
    with pytest.raises(RuntimeError, match=r"1 of 4 runs failed:\n\{'number': 5, 'by': 0\}: ZeroDivision"):
        run_all(work, [dict(number=5, by=0), *runs], folder)
    assert calls(folder) == ["1", "2", "3", "3", "5"]
    assert [r["half"] for r in run_all(work, runs, folder)] == [0.5, 1, 1.5]
    assert len([*folder.glob("*.json")]) == 3


def test_a_run_is_named_by_what_it_does():
    run = dict(seed=0, settings=dict(consistency=True))
    others = dict(run, seed=1), dict(run, settings=dict(consistency=False)), dict(seed=0)
    assert len({run_id(r) for r in (run, *others)}) == 4
    assert run_id(dict(reversed(run.items()))) == run_id(run)


@pytest.mark.parametrize("text, reward", [
    ("[1, 2, 3, 4]", 1.0), (" [1, 2, 3, 4]\n", 1.0), ("[1, 2, 3, 4] ", 1.0), ("[3, 2, 1, 4]", 0.0),
    ("[1, 2, 3]", 0.0), ("the box [1, 2, 3, 4]", 0.0), ("[1, 2, 3, 4] [1, 2, 3, 4]", 0.0), ("", 0.0),
    ("<think>x</think><answer>[1, 2, 3, 4]</answer>", 0.0)])
def test_the_form_of_an_answer_without_thoughts(text, reward):
    assert box_only_reward([[{"role": "assistant", "content": text}], text]) == [reward] * 2
    assert not reward or parse_completion(text).box == (1, 2, 3, 4)


ious = st.lists(st.lists(st.floats(0, 1), min_size=3, max_size=3), min_size=1, max_size=4)


@given(ious, ious)
def test_an_effect_is_the_mean_paired_difference_and_turns_its_sign(arm, other):
    there, back = effect(arm, other, [*"abc"]), effect(other, arm, [*"abc"])
    assert there["IoU"] == pytest.approx(np.mean(arm) - np.mean(other), abs=1e-9)
    assert there["IoU_low"] <= there["IoU"] + 1e-9 and there["IoU"] <= there["IoU_high"] + 1e-9
    assert there["Acc@0.5"] == pytest.approx(-back["Acc@0.5"])


def test_questions_of_one_picture_are_drawn_together():
    arm, other = np.array([[1.0, 1.0, 0.0, 0.0] * 10]), np.zeros((1, 40))
    apart, together = effect(arm, other, range(40)), effect(arm, other, np.arange(40) // 2)
    assert together["IoU_high"] - together["IoU_low"] > apart["IoU_high"] - apart["IoU_low"]


def test_the_ious_of_an_arm_have_a_row_for_each_seed():
    results = [dict(ious=dict(test=[0.1, 0.2])), dict(ious=dict(test=[0.3, 0.4]))]
    assert arm_ious(results, "test").tolist() == [[0.1, 0.2], [0.3, 0.4]]
