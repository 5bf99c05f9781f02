"""From drafts to a dataset with provenance, a file and a page; and the command that makes them."""
import json
import re
from dataclasses import replace
from pathlib import Path

import pytest
from datasets import Dataset
from PIL import Image

from rsground_nb import scenes, synthesis
from rsground_nb.boxes import Codec
from rsground_nb.chat import Server
from rsground_nb.cot import RULE_VERSION, Draft, rule_drafts
from rsground_nb.thoughts import from_json, to_json
from rsground_nb.data import load_folder, to_dataset
from rsground_nb.filters import CODES
from rsground_nb.run import main
from rsground_nb.scenes import scene_records
from rsground_nb.synthesis import (VERDICTS, count_verdicts, judge, load_chains, make_chains, read_table,
                                   synthesise, training_rows, write_audit, write_table)

CODEC = Codec("qwen2_5_vl", max_pixels=112 * 112)


@pytest.fixture(scope="module")
def rows(): return to_dataset(list(scene_records(12, 0)))


@pytest.fixture(scope="module")
def mixed(rows):
    """One draft of each of several kinds: as written, without an answer, no reply, another box, betrayed."""
    drafts = rule_drafts(rows, CODEC)
    drafts[1] = replace(drafts[1], completion=drafts[1].completion.split("<answer>")[0])
    drafts[2] = Draft(trouble="HTTP 500 after 6 tries")
    drafts[3] = replace(drafts[3],
                        completion=drafts[3].completion.replace("<think>", "<think>As the given box shows. "))
    return drafts


def test_every_draft_is_counted_once_and_the_faulty_are_dropped(rows, mixed):
    table = judge(rows, mixed, CODEC, teacher="test", prompt_version="1", seed=0)
    counts = count_verdicts(table)
    assert table.verdict.tolist() == ["ok", "no_box", "no_reply", "leak", *["ok"] * 8]
    assert (list(counts.index) == ["ok", *CODES, "no_reply"] and counts.rows.sum() == 12
            and counts.share.sum() == pytest.approx(1))
    kept = training_rows(rows, table)
    assert kept["expression_id"][:] == [i for i, v in zip(rows["expression_id"], table.verdict) if v == "ok"]
    assert (set(kept["teacher"]) == {"test"} and set(kept["prompt_version"]) == {"1"}
            and set(kept["seed"]) == {0})
    for k, row in enumerate(kept):
        line = table.set_index("expression_id").loc[row["expression_id"]]
        assert (row["completion"][0]["content"][0]["text"] == line.completion
                and row["expression"] in row["prompt"][0]["content"][1]["text"])
        assert (row["image"].tobytes()
                == rows[table.index[table.expression_id == row["expression_id"]][0]]["image"].tobytes())


def test_rows_and_drafts_must_come_in_pairs(rows, mixed):
    with pytest.raises(ValueError, match="11 drafts for 12 rows"): judge(rows, mixed[:-1], CODEC)
    table = judge(rows, mixed, CODEC)
    with pytest.raises(ValueError, match="not the same expressions in the same order"):
        training_rows(rows.select(range(11, -1, -1)), table)


def test_nothing_kept_is_an_empty_dataset_not_an_error(rows):
    kept, table = synthesise(rows, CODEC, [Draft(trouble="no server")] * 12, teacher="none",
                             prompt_version="0")
    assert (len(kept) == 0 and {"prompt", "completion", "image", "teacher"} <= set(kept.column_names)
            and set(table.verdict) == {"no_reply"})


def test_the_table_comes_back_from_its_file(rows, mixed, tmp_path):
    table = judge(rows, mixed, CODEC, teacher="tëst\u2028", prompt_version="1", seed=0)
    write_table(table, tmp_path / "chains.jsonl")
    assert read_table(tmp_path / "chains.jsonl").to_dict("records") == table.to_dict("records")


def test_each_line_keeps_its_thought_and_says_which_filters_judged_it(rows, tmp_path):
    drafts = rule_drafts(rows, CODEC)
    drafts[1] = Draft("<think>The ship is there.</think>" + drafts[1].completion.split("</think>")[1])
    table = judge(rows, drafts, CODEC)
    write_table(table, tmp_path / "chains.jsonl")
    back = read_table(tmp_path / "chains.jsonl")
    assert back.judged.tolist() == ["thought", "plain", *["thought"] * 10] and set(table.verdict) == {"ok"}
    assert [t and from_json(json.dumps(t)) for t in back.thought] == [d.thought for d in drafts]
    assert training_rows(rows, back)["judged"][:3] == ["thought", "plain", "thought"]
    assert count_verdicts(back).plain.to_dict() == {v: int(v == "ok") for v in VERDICTS}
    write_audit(rows, back, CODEC, tmp_path / "a.html")
    page = (tmp_path / "a.html").read_text()
    assert page.count("judged: plain") == 1 and page.count("judged: thought") == 11


def test_a_false_field_of_a_thought_drops_its_row(rows):
    drafts = rule_drafts(rows, CODEC)
    thought = from_json(to_json(drafts[0].thought))
    thought.target.category = "windmill"
    table = judge(rows, [replace(drafts[0], thought=thought), *drafts[1:]], CODEC)
    assert table.verdict.tolist() == ["misread", *["ok"] * 11] and len(training_rows(rows, table)) == 11


def test_chains_from_before_thoughts_are_loaded(rows, tmp_path):
    make_chains(rows, CODEC, tmp_path / "c")
    lines = [json.loads(line) for line in (tmp_path / "c" / "chains.jsonl").read_text().splitlines()]
    (tmp_path / "c" / "chains.jsonl").write_text(
        "".join(json.dumps({k: v for k, v in line.items() if k not in ("thought", "judged")}) + "\n"
                for line in lines))
    assert len(load_chains(tmp_path / "c", rows, CODEC)) == 12


LINE = ('{"expression_id": "a", "expression": "the ship", "box": [1, 2, 3, 4], "completion": "", "verdict": '
        '"ok", "faults": []}')


@pytest.mark.parametrize("text, message", [
    ("{", "line 1: not JSON"),
    (LINE + "\n[1]", "line 2: expression_id, expression, box, completion, verdict, faults missing"),
    (LINE.replace('"a"', "3"), "line 1: expression_id missing or of the wrong kind"),
    (LINE.replace("[1, 2, 3, 4]", "null"), "line 1: box missing"),
    (LINE + "\n" + LINE, "'a' occurs more than once")])
def test_a_broken_file_is_refused_with_its_line(tmp_path, text, message):
    (tmp_path / "chains.jsonl").write_text(text)
    with pytest.raises(ValueError, match=message): read_table(tmp_path / "chains.jsonl")


def test_chains_are_loaded_for_the_same_rows_and_student_only(rows, tmp_path):
    table = make_chains(rows, CODEC, tmp_path / "c", seed=3)
    assert (table.verdict == "ok").all()
    some = rows.select([7, 0])
    assert load_chains(tmp_path / "c", some, CODEC)["expression_id"][:] == some["expression_id"][:]
    with pytest.raises(ValueError, match="but this student needs"):
        load_chains(tmp_path / "c", rows, Codec("qwen3_vl"))
    with pytest.raises(ValueError, match="no line for 3 of 3 rows"):
        load_chains(tmp_path / "c", to_dataset(list(scene_records(3, 0, split="val"))), CODEC)
    moved = to_dataset([{**r, "box": [b + 1 for b in r["box"]]} for r in scene_records(3, 0)])
    with pytest.raises(ValueError, match="is not the one in the data"):
        load_chains(tmp_path / "c", moved, CODEC)
    with pytest.raises(ValueError, match="not a finished folder of chains"):
        load_chains(tmp_path, rows, CODEC)


def test_the_same_work_twice_is_the_same_and_other_work_is_refused(rows, tmp_path):
    first = make_chains(rows, CODEC, tmp_path / "c", seed=3)
    assert make_chains(rows, CODEC, tmp_path / "c", seed=3).to_dict("records") == first.to_dict("records")
    kept = (tmp_path / "c" / "chains.jsonl").read_bytes()
    for other in (dict(seed=4), dict(lowest_iou=0.7)):
        with pytest.raises(ValueError, match="holds another run"):
            make_chains(rows, CODEC, tmp_path / "c", **{"seed": 3, **other})
    (tmp_path / "c" / "mine.txt").write_text("precious")
    with pytest.raises(ValueError, match="'mine.txt', which is not a file of chains"):
        make_chains(rows, CODEC, tmp_path / "c", seed=3)
    assert (tmp_path / "c" / "chains.jsonl").read_bytes() == kept


def test_an_interrupted_work_is_done_again_and_other_work_is_refused(rows, tmp_path, monkeypatch):
    def stop(*args): raise KeyboardInterrupt
    with monkeypatch.context() as m:
        m.setattr(synthesis, "write_audit", stop)
        with pytest.raises(KeyboardInterrupt): make_chains(rows, CODEC, tmp_path / "c")
    with pytest.raises(ValueError, match="not a finished folder"): load_chains(tmp_path / "c", rows, CODEC)
    with pytest.raises(ValueError, match="holds another run"):
        make_chains(rows, CODEC, tmp_path / "c", seed=1)
    made = make_chains(rows, CODEC, tmp_path / "c")
    assert made.to_dict("records") == read_table(tmp_path / "c" / "chains.jsonl").to_dict("records")
    assert sorted(p.name for p in (tmp_path / "c").iterdir()) == ["audit.html", "chains.jsonl", "counts.csv",
                                                                  "made_by.json"]


def test_a_file_of_somebody_else_is_left_alone(rows, tmp_path):
    (tmp_path / "chains.jsonl").write_text("mine")
    with pytest.raises(ValueError, match="but not how it was made"): make_chains(rows, CODEC, tmp_path)
    assert ([p.name for p in tmp_path.iterdir()] == ["chains.jsonl"]
            and (tmp_path / "chains.jsonl").read_text() == "mine")


def test_a_write_that_fails_leaves_the_old_file_and_no_other(tmp_path, monkeypatch):
    (tmp_path / "a.html").write_text("old")
    def full(self, *args, **kw): self.touch(); raise OSError(28, "No space left on device")
    monkeypatch.setattr(Path, "write_text", full)
    with pytest.raises(OSError, match="No space"): synthesis.write_whole(tmp_path / "a.html", "new")
    assert [p.name for p in tmp_path.iterdir()] == ["a.html"] and (tmp_path / "a.html").read_text() == "old"


def test_a_chat_teacher_asked_in_another_way_is_other_work(rows, tmp_path, monkeypatch):
    monkeypatch.setattr(synthesis, "chat_drafts",
                        lambda rows, *a: [Draft(trouble="not asked: a test")] * len(rows))
    server = Server("http://127.0.0.1:1/v1", "m")
    make_chains(rows, CODEC, tmp_path / "c", replace(server, url="http://127.0.0.1:2/v1", workers=1))
    make_chains(rows, CODEC, tmp_path / "c", server)
    for other in (dict(temperature=1.0), dict(model="n"), dict(seed=1), dict(max_tokens=9)):
        with pytest.raises(ValueError, match="holds another run"):
            make_chains(rows, CODEC, tmp_path / "c", replace(server, **other))


def test_a_row_whose_image_is_gone_keeps_its_card_without_a_picture(mixed, tmp_path):
    records = list(scene_records(12, 0))
    records[0]["image"], records[1]["image"] = ({"bytes": b"no picture", "path": None},
                                                {"bytes": None, "path": str(tmp_path / "gone.png")})
    broken = to_dataset(records)
    table = judge(broken, mixed, CODEC)
    write_audit(broken, table, CODEC, tmp_path / "a.html")
    page = (tmp_path / "a.html").read_text()
    assert page.count("The image cannot be read: ") == 2 and page.count("data:image/png") == 10
    assert (training_rows(broken, table)["expression_id"][:]
            == [r["expression_id"] for r, v in zip(records, table.verdict) if v == "ok"])


def test_choosing_rows_copies_no_picture(rows, mixed, monkeypatch):
    monkeypatch.setattr(Dataset, "flatten_indices", lambda self, **kw: pytest.fail("pictures are copied"))
    assert len(training_rows(rows, judge(rows, mixed, CODEC))) == 9


def test_the_audit_page_stands_alone_shows_every_verdict_and_escapes_what_it_quotes(rows, mixed, tmp_path):
    nasty = [replace(mixed[0], completion="<script>alert(1)</script>"), *mixed[1:]]
    table = judge(rows, nasty, CODEC)
    write_audit(rows, table, CODEC, tmp_path / "a.html", count=3, seed=0, about=dict(teacher="<b>me</b>"))
    page = (tmp_path / "a.html").read_text()
    assert "<script>" not in page and "&lt;script&gt;" in page and "<b>me</b>" not in page
    assert not re.search(r'(?:src|href)="(?:https?:)?//', page)
    # three kept, one of each of the others
    assert page.count('<div class="card">') == page.count('src="data:image/png;base64,') == 3 + 4
    for verdict in set(table.verdict): assert f'<h2 id="{verdict}">{verdict}: ' in page
    assert "HTTP 500 after 6 tries" in page


@pytest.mark.parametrize("codec", [CODEC, Codec("qwen3_vl")], ids=lambda c: c.name)
def test_two_thousand_scenes_are_all_kept(monkeypatch, codec):
    # the pictures are not looked at
    monkeypatch.setattr(scenes, "draw_scene", lambda scene, rng: Image.new("RGB", (2, 2)))
    rows = to_dataset([r for style, count in (("simple", 1000), ("aerial", 600), ("other", 400))
                       for r in scenes.scene_records(count, 5, style=style, split=style)])
    table = judge(rows, rule_drafts(rows, codec), codec)
    assert count_verdicts(table).rows.to_dict() == {v: 2000 * (v == "ok") for v in VERDICTS}, table[
        table.verdict != "ok"][["expression", "completion", "trouble", "faults"]].head(3).to_dict("records")


def test_aerial_mini_is_all_kept(shared):
    for name, rows in load_folder(shared / "aerial_mini")[0].items():
        table = synthesise(rows, Codec("qwen2_5_vl"))[1]
        assert set(table.verdict) == {"ok"}, name
        assert table.completion.str.contains("<think>").all()


CHAT = ["--teacher", "chat", "--url", "http://127.0.0.1:1/v1", "--model", "m"]


def test_the_command_writes_and_repeats_and_refuses(tmp_path, capsys):
    words = ["cot", "--out", str(tmp_path / "c"), "--limit", "20", "--samples", "2"]
    assert main(words) == 0 == main(words)
    said = capsys.readouterr().out
    assert re.search(r"ok +20 ", said) and "audit.html" in said
    made = json.loads((tmp_path / "c" / "made_by.json").read_text())
    assert (made["teacher"] == "rule" and made["prompt_version"] == RULE_VERSION and made["rows"] == 20
            and "asked" not in made)
    page = (tmp_path / "c" / "audit.html").read_text()
    assert "commit" in page and "seed" in page and page.count('<div class="card">') == 2
    for more, message in (
            (["--seed", "1"], "holds another run"), (["--split", "dev"], "has no split 'dev'"),
            (["--teacher", "chat"], "needs --url and --model"),
            (["--limit", "0"], "at least 1"), (["--student", "no/such/model"], "cannot be read here"),
            (["--scale", "big"], "unknown scale"), (["--data", "no/such"], "is not a folder"),
            (["--lowest-iou", "2"], "--lowest-iou 2.0 is outside"),
            (["--samples", "-1"], "--samples -1: at least 0"), (["--seed", "-1"], "--seed -1: at least 0"),
            (["--max-pixels", "0"], "--max-pixels 0: at least 3136"),
            (["--budget", "9"], "are for --teacher chat"),
            (CHAT + ["--budget", "0"], "--budget 0: at least 1"),
            (CHAT + ["--settings", "{"], "--settings {"), (CHAT + ["--settings", '{"top_p": 1}'], "top_p"),
            (CHAT + ["--key-env", "sk-secret"], "not the key itself")):
        assert main([*words, *more]) == 2, more
        assert message in capsys.readouterr().err, more
    assert main(["cot", "--out", str(tmp_path / "q"), "--limit", "5", "--student", "qwen3_vl"]) == 0
    assert json.loads((tmp_path / "q" / "made_by.json").read_text())["codec"]["name"] == "qwen3_vl"


def test_the_threshold_decides(rows):
    drafts = rule_drafts(rows, CODEC)
    moved = [replace(d, completion=re.sub(
        r"<answer>\[(\d+), (\d+), (\d+), (\d+)\]",
        lambda m: "<answer>[{}, {}, {}, {}]".format(int(m[1]) + 3, int(m[2]) + 3, m[3], m[4]), d.completion))
             for d in drafts]
    strict, loose = (judge(rows, moved, CODEC, t).verdict.eq("wrong_box").sum() for t in (0.95, 0.05))
    assert strict > loose == 0
