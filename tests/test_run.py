"""The whole run: every chapter through papermill, then what it left behind; and every way to ask for it
wrongly."""
import json
import re

import nbformat
import pandas as pd
import pytest
from PIL import Image

from conftest import ROOT, said_by_checks
from rsground_nb.data import load_data, to_dataset
from rsground_nb.evaluate import read_predictions, stage_table, write_predictions
from rsground_nb.model import student_codec
from rsground_nb.refer import load_real_samples
from rsground_nb.run import COURSE, ORDER, STAGES, gallery, main, run_chapter, setbacks, summary, title_of
from rsground_nb.scale import get_scale
from rsground_nb.steps import Run
from rsground_nb.synthesis import load_chains, read_table

@pytest.mark.parametrize("name", sorted({*COURSE, *ORDER}))
def test_every_chapter_ran_to_its_end(smoke_run, name):
    notebook = nbformat.read(smoke_run / "notebooks" / f"{name}.ipynb", as_version=4)
    code = [c for c in notebook.cells if c.cell_type == "code"]
    assert all(c.execution_count for c in code if c.source.strip())
    assert not [o for c in code for o in c.outputs if o.output_type == "error"]


def test_an_unanswered_exercise_says_so(smoke_run):
    solved = sorted((ROOT / "nbs" / "solutions").glob("*.ipynb"))
    assert solved
    for path in solved:
        executed = nbformat.read(next((smoke_run / "notebooks").rglob(path.name)), as_version=4)
        assert set(said_by_checks(executed)) == {"'not answered yet'"}, path.stem


def test_training_left_curves_and_moved_all_but_the_tower(smoke_run):
    for stage in ("sft", "grpo"):
        weights = pd.read_csv(smoke_run / stage / "weights.csv", index_col="weights")
        assert weights.loc["frozen", "before"] == weights.loc["frozen", "after"], stage
        assert weights.loc["trained", "before"] != weights.loc["trained", "after"], stage
        assert ((smoke_run / stage / "model" / "model.safetensors").is_file()
                and not (smoke_run / stage / "adapter").exists())
    log = pd.read_csv(smoke_run / "grpo" / "log.csv")
    assert list(log.step) == list(range(1, get_scale("smoke").grpo_steps + 1))
    assert log["reward"].notna().all() and log["reward"].std() > 0
    assert log["consistency/weight_mean"].between(1, 3).all()


def test_sft_goes_on_from_the_shipped_model_and_keeps_what_it_knows(smoke_run):
    """The loss of a base that has never seen a chain is above 2 nats per token in the first steps."""
    loss = pd.read_csv(smoke_run / "sft" / "log.csv").loss
    assert loss.iloc[0] < 1 and loss.iloc[-5:].mean() < 1.1 * loss.iloc[:5].mean()


def test_metrics_count_every_expression_once(smoke_run):
    table = pd.read_csv(smoke_run / "metrics.csv").set_index("split")
    splits, _ = load_data("scenes", get_scale("smoke"), 0)
    assert table.N.to_dict() == {name: len(rows) for name, rows in splits.items()}
    for split in splits:
        found = read_predictions(smoke_run / "predictions" / f"GRPO_{split}.jsonl")
        assert len({p["expression_id"] for p in found}) == len(found) == table.N[split]
        assert table.mIoU[split] == pytest.approx(sum(p["iou"] for p in found) / len(found))


def test_most_answers_can_be_read_after_sft(smoke_run):
    table = pd.read_csv(smoke_run / "stages.csv").set_index(["split", "stage"]).unparsable
    assert table["test", "CoT-SFT"] < 0.1 and table["real", "CoT-SFT"] < 0.1


def test_every_stage_answers_the_drawn_and_the_real_questions(smoke_run):
    table = pd.read_csv(smoke_run / "stages.csv").set_index(["split", "stage"])
    for split, rows in {"test": load_data("scenes", get_scale("smoke"), 0)[0]["test"],
                        "real": load_real_samples()}.items():
        for stage in STAGES:
            found, row = (read_predictions(smoke_run / "predictions" / f"{stage}_{split}.jsonl"),
                          table.loc[(split, stage)])
            assert [p["expression_id"] for p in found] == rows["expression_id"][:] and row.N == len(rows)
            assert row["Acc@0.5"] == pytest.approx(sum(p["iou"] >= 0.5 for p in found) / len(found))
            assert (row["Acc@0.5_low"] <= row["Acc@0.5"] <= row["Acc@0.5_high"]
                    and row["Acc@0.5_low"] < row["Acc@0.5_high"])
    said = summary(smoke_run)
    for split, label in (("test", "drawn"), ("real", "real")):
        values = " -> ".join(f"{v:.2f}" for v in table.loc[split]["Acc@0.5"][list(STAGES)])
        assert f"{label} {values} (N = {table.loc[(split, 'GRPO')].N})" in said


def test_the_report_begins_with_pictures_and_shows_every_stage(smoke_run):
    page = (smoke_run / "report.html").read_text()
    order = ['class="card"', 'class="stages"', 'class="curves"', "<table"]
    assert [page.index(what) for what in order] == sorted(page.index(what) for what in order)
    assert (page.index("Real pictures, never trained on") < page.index("Drawn pictures, held out")
            < page.index('class="stages"'))
    found = [p for stage in STAGES for split in ("test", "real")
             for p in read_predictions(smoke_run / "predictions" / f"{stage}_{split}.jsonl")[:12]]
    boxes = page.count('class="card"') * 2 + sum(p["predicted"] is not None for p in found)
    # and the legend
    assert page.count('class="card"') == 24 and page.count("<rect") == boxes + 2 + len(STAGES)


def test_a_card_has_every_stage_and_is_escaped(tmp_path):
    rows = to_dataset([dict(expression="<b>plane</b>", image=Image.new("RGB", (640, 320)), width=640,
                            height=320, box=[0, 0, 10, 10])])
    for stage, box in zip(STAGES, (None, [0, 0, 9, 9], [0, 0, 10, 10])):
        answer = "" if box is None else f"<think>{stage} <i></think><answer>[0, 0, 9, 9]</answer>"
        write_predictions([dict(answer=answer, predicted=box, reason="empty", iou=0.5)],
                          tmp_path / f"{stage}_test.jsonl")
    card, = gallery(tmp_path, rows, "test")
    assert ([a["predicted"] for a in card["answers"]] == [None, [0, 0, 9, 9], [0, 0, 10, 10]]
            and card["thought"] == "GRPO <i>")
    assert ((card["width"], card["height"]) == (640, 320)
            and card["picture"].startswith("data:image/png;base64,"))


def test_stages_say_what_was_shipped_and_what_was_trained_just_now(smoke_run):
    size, rows = (get_scale("smoke"),
                  pd.read_csv(smoke_run / "stages.csv").query("split == 'test'").set_index("stage"))
    told = {name: (rows.start[name], rows.steps[name]) for name in ("base", "CoT-SFT", "GRPO")}
    assert told == {"base": ("tiny", 0), "CoT-SFT": ("tiny-sft", size.sft_steps),
                    "GRPO": ("CoT-SFT", size.grpo_steps)}
    page = (smoke_run / "report.html").read_text()
    assert "tiny-sft (shipped)" in page and "tiny (shipped)" in page
    for name, before in (("CoT-SFT", "base"), ("GRPO", "CoT-SFT")):
        assert rows.change[name] == pytest.approx(rows.mIoU[name] - rows.mIoU[before])
        assert rows.change_low[name] <= rows.change[name] <= rows.change_high[name]


def test_no_stage_of_a_smoke_run_ends_below_the_one_before(smoke_run):
    assert (setbacks(pd.read_csv(smoke_run / "stages.csv")) == []
            and 'class="setback"' not in (smoke_run / "report.html").read_text())


def test_a_stage_that_loses_is_told_in_red():
    def answers(*ious):
        return [dict(image_id=str(k), box=[0, 0, 10, 10], predicted=[0, 0, 10, 10 * v]) | dict(iou=v)
                for k, v in enumerate(ious)]
    stages = {"constant guess": answers(0.1, 0.1, 0.1), "base": answers(0.5, 0.5, 0.6),
              "CoT-SFT": answers(0.2, 0.1, 0.3), "GRPO": answers(0.2, 0.5, 0.1)}
    table = stage_table(stages, get_scale("workshop"), split="test", hash="x")
    assert (table.start.tolist()[1:] == ["tiny", "tiny", "CoT-SFT"]
            and table.steps.tolist()[1:] == [0, 700, 120])
    (said,) = setbacks(table)
    assert said.startswith("CoT-SFT is worse than the stage before it: mean IoU -0.333")


def test_a_run_keeps_its_chains_and_learned_from_all_that_passed(smoke_run):
    table = read_table(smoke_run / "chains" / "chains.jsonl")
    splits, _ = load_data("scenes", get_scale("smoke"), 0)
    assert list(table.expression_id) == splits["train"]["expression_id"][:]
    assert ((smoke_run / "chains" / "audit.html").is_file()
            and pd.read_csv(smoke_run / "chains" / "counts.csv").rows.sum() == len(table))
    assert (len(load_chains(smoke_run / "chains", splits["train"], student_codec()))
            == (table.verdict == "ok").sum() > 0)
    assert Run(smoke_run).chains == smoke_run / "chains"


def test_the_report_stands_alone_and_names_every_chapter(smoke_run):
    page = (smoke_run / "report.html").read_text()
    for name in COURSE: assert f"notebooks/{name}.ipynb" in page and title_of(name)[0] in page
    assert len(re.findall(r'<img src="data:image/png;base64,', page)) == page.count("<img") >= 2 * 8 + 4
    assert not re.search(r'(?:src|href)="(?:https?:)?//', page)


def test_run_json_tells_how_it_was_made(smoke_run):
    run = json.loads((smoke_run / "run.json").read_text())
    assert set(run["chapters"]) == set(COURSE)
    assert {"scale", "seed", "data", "command", "commit", "versions", "started"} <= set(run)


@pytest.mark.parametrize("words, message", [
    (["--scale", "smokey"], "unknown scale 'smokey'"), (["--data", "no/such/folder"], "is not a folder"),
    (["--data", "tests"], "none of the known layouts"),
    (["--seed", "-4"], "--seed -4: at least 0"), (["--seed", "x"], "invalid int value"),
    (["--sede", "3"], "unrecognized arguments: --sede"), (["--resume"], "holds no run to resume")])
def test_bad_input_is_one_sentence_and_exit_code_2(tmp_path, capsys, words, message):
    try: code = main(["run", *words, "--out", str(tmp_path / "x")])
    except SystemExit as stop: code = stop.code
    said = capsys.readouterr().err.strip()
    assert code == 2 and message in said and "\n" not in said
    assert not (tmp_path / "x").exists()


def test_no_folder_is_written_over(tmp_path, capsys):
    (tmp_path / "mine.txt").write_text("precious")
    (tmp_path / "file").write_text("precious")
    assert main(["run", "--out", str(tmp_path)]) == 2 and "not an empty folder" in capsys.readouterr().err
    assert (main(["run", "--out", str(tmp_path / "file" / "below")]) == 2
            and "cannot" in capsys.readouterr().err)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["file", "mine.txt"]


def test_the_folder_of_another_run_is_refused(smoke_run, capsys):
    kept = (smoke_run / "metrics.csv").read_bytes()
    assert main(["run", "--out", str(smoke_run)]) == 2 and "already holds a run" in capsys.readouterr().err
    assert (main(["run", "--resume", "--seed", "7", "--out", str(smoke_run)]) == 2
            and "with seed 0, not 7" in capsys.readouterr().err)
    assert (smoke_run / "metrics.csv").read_bytes() == kept


def test_a_chapter_refuses_a_parameter_that_it_does_not_have(tmp_path):
    with pytest.raises(ValueError,
                       match="reference/train has no parameter sede: it has scale, seed, out, data"):
        run_chapter("reference/train", tmp_path / "x.ipynb", sede=3)
    assert not (tmp_path / "x.ipynb").exists()
