"""Many small trainings: each run once, resumed after a kill, faults named; the effect of an arm by hand."""
import os
import re
import signal
import subprocess
import sys
import time
from zipfile import ZipFile

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, strategies as st

from rsground_nb.ablation import effect, seed_effects, verdict
from conftest import ROOT
from rsground_nb.boxes import parse_completion
from rsground_nb.folders import write_jsonl
from rsground_nb.refer import write_refer
from rsground_nb.run import main
from rsground_nb.scoring import evaluate_file
from rsground_nb.studies import arm_ious, box_only_reward, run_all, run_id

KEPT = ROOT / "tests" / "predictions"
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


@given(st.integers(1, 4).flatmap(lambda n: st.tuples(*[st.lists(
    st.lists(st.floats(0, 1), min_size=3, max_size=3), min_size=n, max_size=n)] * 2)))
def test_an_effect_is_the_mean_paired_difference_and_turns_its_sign(arms):
    arm, other = arms
    there, back = effect(arm, other, [*"abc"]), effect(other, arm, [*"abc"])
    assert there["IoU"] == pytest.approx(np.mean(arm) - np.mean(other), abs=1e-9)
    assert there["IoU_low"] <= there["IoU"] + 1e-9 and there["IoU"] <= there["IoU_high"] + 1e-9
    assert there["Acc@0.5"] == pytest.approx(-back["Acc@0.5"])
    assert [there[f"IoU_seeds_{end}"] for end in ("low", "high")] == pytest.approx(
        [-back[f"IoU_seeds_{end}"] for end in ("high", "low")], abs=1e-9, nan_ok=True)


def test_the_interval_over_seeds_is_students_t():
    arm, other = np.array([[0.2, 0.4], [0.5, 0.3], [0.6, 0.4]]), np.array([[0.1, 0.1]])
    each = [0.2, 0.3, 0.4]  # mean 0.3, standard error 0.1 / sqrt(3)
    found = effect(arm, other, [*"ab"])
    assert found["IoU"] == pytest.approx(np.mean(each))
    assert found["IoU_seeds_high"] - found["IoU"] == pytest.approx(4.302653 * 0.1 / 3 ** 0.5)


@given(st.lists(st.floats(-0.1, 0.1), min_size=2, max_size=2).map(sorted))
def test_a_verdict_turns_with_the_sign_and_widening_an_interval_never_adds_certainty(ends):
    (low, high), mirror = ends, dict(gain="loss", loss="gain")
    said = verdict((low, high))
    assert mirror.get(verdict((-high, -low))) == (None if said in ("no gain", "cannot tell") else said)
    less = {said, "cannot tell", "no gain" if said == "loss" else said}
    assert verdict((low - 0.02, high + 0.03)) in less
    assert verdict((low, high), (low - 0.02, high + 0.03)) in less


def test_questions_of_one_picture_are_drawn_together():
    arm, other = np.array([[1.0, 1.0, 0.0, 0.0] * 10]), np.zeros((1, 40))
    apart, together = effect(arm, other, range(40)), effect(arm, other, np.arange(40) // 2)
    assert together["IoU_high"] - together["IoU_low"] > apart["IoU_high"] - apart["IoU_low"]


def test_the_effects_of_single_seeds_have_the_tables_mean():
    runs, effects = (pd.read_csv(ROOT / "tests" / f"studies{name}.csv") for name in ("", "_effects"))
    for row in effects[effects.questions == "together"].itertuples():
        each = seed_effects(runs, row.study, row.arm, row.against)
        assert len(each) == 5 and each.mean() == pytest.approx(row.IoU, abs=3e-4), row  # both are rounded


def test_the_ious_of_an_arm_have_a_row_for_each_seed():
    results = [dict(ious=dict(test=[0.1, 0.2])), dict(ious=dict(test=[0.3, 0.4]))]
    assert arm_ious(results, "test").tolist() == [[0.1, 0.2], [0.3, 0.4]]


@pytest.fixture(scope="module")
def questions(shared, tmp_path_factory):
    from train_shipped import drawn, real
    folder = tmp_path_factory.mktemp("real")
    (folder / "planes").mkdir()
    (folder / "planes" / "test").symlink_to(shared / "aerial_planes" / "test")
    write_refer(folder / "planes", folder / "0", (160, 256, 360), seed=0)
    return {"rival": drawn(512, 3110, "test", True), "all": drawn(512, 3111, "test", False),
            "real": real(folder / "0", "test", 0.14)}


@pytest.mark.parametrize("file", sorted(KEPT.glob("*.zip")), ids=lambda f: f.stem)
def test_the_predictions_of_the_final_models_score_as_the_table_says(file, questions, tmp_path):
    table = pd.read_csv(KEPT.parent / "studies.csv")
    names = (table.study + "_" + table.arm).str.replace(" ", "_").str.replace("[',]", "", regex=True)
    rows = table[names == file.stem].set_index(["seed", "questions"])
    with ZipFile(file) as kept: kept.extractall(tmp_path)
    found = {tuple(p.stem.split("_")): p for p in tmp_path.glob("*.jsonl")}
    assert {(int(seed), name) for seed, name in found} == {k for k in rows.index if k[1] in questions}
    for (seed, name), path in found.items():
        modes = evaluate_file(path, questions[name], draws=2)[0].set_index("mode").loc["standard"]
        expected = rows.loc[int(seed), name]
        assert modes["meanIoU"] == pytest.approx(expected["mIoU"], abs=2e-4)
        assert modes["Pr@0.5"] == pytest.approx(expected["Acc@0.5"], abs=2e-3)  # boxes are rounded


def test_the_command_scores_such_a_file(questions, tmp_path, capsys):
    (tmp_path / "images").mkdir()
    rows = [dict(row, path=tmp_path / "images" / f"{row['image_id']}.png") for row in questions["rival"]]
    for row in rows: row["image"].save(row["path"])
    rows = [dict(row, image=str(row["path"])) for row in rows]
    images = write_jsonl(rows, tmp_path / "test.jsonl", tmp_path / "images")
    with ZipFile(KEPT / "rewards_start.zip") as kept: kept.extract("0_rival.jsonl", tmp_path)
    asked = ["evaluate", f"{tmp_path}/0_rival.jsonl", "--data", f"{tmp_path}/test.jsonl@{images}"]
    assert main([*asked, "--out", str(tmp_path / "scores")]) == 0
    scores = pd.read_csv(tmp_path / "scores" / "modes.csv").set_index("mode").loc["standard"]
    table = pd.read_csv(KEPT.parent / "studies.csv").set_index(["study", "arm", "questions"]).mIoU
    assert scores["meanIoU"] == pytest.approx(table["rewards", "start", "rival"].item(), abs=2e-4)


def test_the_learning_rates_did_best_on_the_tuning_questions():
    trials = pd.read_csv(KEPT.parent / "trials_studies.csv")
    grpo = trials[trials.arm == "GRPO, IoU and format"]
    best = grpo.loc[grpo.groupby("start")["tune, mIoU"].idxmax()].set_index("start").learning_rate
    taken = re.search(r"^RATE, THINK_RATE = (\S+), (\S+)", (KEPT.parent / "studies.py").read_text(), re.M)
    assert best[["answers-early", "chains-middle"]].tolist() == [float(rate) for rate in taken.groups()]
