"""`rsground predict`: pictures of every kind, questions from a file, and every way to ask for it wrongly. And
the shipped models that it asks."""
import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from rsground_nb.loading import ASSETS, SHIPPED
from rsground_nb.model import load_tiny, load_vlm, student_codec
from rsground_nb.refer import load_real_samples
from rsground_nb.run import main
from rsground_nb.scoring import question_row, read_questions

SAID = "<think>Target: plane. Planes: 20 30.</think><answer>[100, 200, 300, 400]</answer>"


@pytest.fixture(scope="module")
def crop():
    """The first of the real crops, at 192x192 px."""
    return load_real_samples()[0]["image"].resize((192, 192))


@pytest.fixture
def model_says(monkeypatch):
    """Let the model say SAID (thousandths), whatever it is asked; returns what it was asked."""
    asked = []

    def answer(model, processor, images, questions, template, **kwargs):
        asked.extend(zip(images, questions, [template] * len(questions)))
        return [SAID if "think" in template else "[100, 200, 300, 400]"] * len(questions)
    monkeypatch.setattr("rsground_nb.evaluate.generate_answers", answer)
    return asked


def test_three_models_are_shipped_whole_and_small():
    folders = [Path(str(ASSETS / folder)) for folder in SHIPPED.values()]
    assert sum(p.stat().st_size for f in folders for p in f.iterdir()) <= 12e6
    for stage, (name, folder) in zip(("base", "sft", "grpo"), zip(SHIPPED, folders)):
        assert {"README.md", "config.json", "model.safetensors", "processor_config.json",
                "tokenizer.json"} <= {p.name for p in folder.iterdir()}
        model, processor = load_tiny(stage)
        assert processor.base == str(folder) == load_vlm(name)[1].base
        assert sum(p.numel() for p in model.parameters()) < 4e6
    with pytest.raises(ValueError, match="unknown stage 'rl': use one of base, sft, grpo"): load_tiny("rl")


@pytest.mark.parametrize("name", SHIPPED)
def test_a_shipped_model_answers_a_real_picture(name, crop, tmp_path, capsys):
    crop.save(tmp_path / "crop.png")
    assert main(["predict", str(tmp_path / "crop.png"), "the plane", "--model", name, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["expression"] == "the plane" and found["answer"]
            and (found["predicted"] is None) == (found["reason"] != "ok"))


def test_thought_box_and_picture(model_says, crop, tmp_path, capsys):
    crop.save(tmp_path / "crop.png")
    assert (main(["predict", str(tmp_path / "crop.png"), "The plane", "--out", str(tmp_path / "boxed.png")])
            == 0)
    said = capsys.readouterr()
    assert ("thought: Target: plane." in said.out
            and "box: [19.2, 38.4, 57.6, 76.8] of 192x192 px" in said.out and not said.err)
    assert model_says[0][1] == "The plane"
    with Image.open(tmp_path / "boxed.png") as drawn:
        assert drawn.size == (448, 448) and drawn.getpixel((45, 120)) == (255, 140, 0)


def test_the_base_is_asked_for_the_box_alone(model_says, crop, tmp_path, capsys):
    crop.save(tmp_path / "crop.png")
    assert main(["predict", str(tmp_path / "crop.png"), "the plane", "--model", "tiny"]) == 0
    assert model_says[0][2] == "Locate {}." and "thought: -\n  box: [19.2," in capsys.readouterr().out


@pytest.mark.parametrize("size, said", [((1920, 960), "shrunk from 1920x960"), ((112, 112), None),
                                        ((30, 40), "enlarged from 30x40")])
def test_a_picture_of_another_size_is_told(size, said, model_says, crop, tmp_path, capsys):
    crop.resize(size).save(tmp_path / "crop.png")
    assert main(["predict", str(tmp_path / "crop.png"), "the plane"]) == 0
    out = capsys.readouterr().out
    assert (said in out) if said else "the model saw" not in out
    assert f"{size[0] / 10:.1f}" in out  # the box is in the picture's own pixels


def test_exif_and_16_bit(model_says, crop, tmp_path, capsys):
    exif = Image.Exif()
    exif[0x0112] = 6  # turned by a quarter
    wide = crop.resize((192, 96))
    wide.save(tmp_path / "turned.jpg", exif=exif)
    Image.fromarray((np.asarray(crop.convert("L")).astype(np.uint16) * 40)).save(tmp_path / "deep.png")
    assert (main(["predict", str(tmp_path / "turned.jpg"), str(tmp_path / "deep.png"), "the plane", "--json"])
            == 0)
    turned, deep = map(json.loads, capsys.readouterr().out.splitlines())
    assert (turned["width"], turned["height"]) == (96, 192) and turned["predicted"] == [9.6, 38.4, 28.8, 76.8]
    assert model_says[0][0].size == (96, 192)
    assert np.asarray(model_says[1][0]).std() > 30, "grey levels are scaled, not cut"


def test_questions_of_a_file_and_a_folder_of_pictures(model_says, crop, tmp_path, capsys):
    (tmp_path / "in").mkdir()
    for k in range(10): crop.save(tmp_path / "in" / f"{k}.png")
    lines = [json.dumps(dict(image=f"{k}.png", expression=f"plane {k}",
                             **({"expression_id": "mine"} if k == 3 else {}))) for k in range(10)]
    (tmp_path / "in" / "q.jsonl").write_text("\n".join(lines) + "\n")
    assert (main(["predict", str(tmp_path / "in" / "q.jsonl"), "--json", "--out", str(tmp_path / "drawn")])
            == 0)
    found = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [f["expression"] for f in found] == [f"plane {k}" for k in range(10)]
    assert [f["expression_id"] for f in found[2:5]] == ["q:3", "mine", "q:5"]
    assert sorted(p.name for p in (tmp_path / "drawn").iterdir()) == [f"{k:02}.png" for k in range(1, 11)]
    (tmp_path / "in" / "list.json").write_text(json.dumps([json.loads(line) for line in lines[:2]]))
    assert [q[1:] for q in read_questions(tmp_path / "in" / "list.json")] == [("plane 0", "list:1"),
                                                                              ("plane 1", "list:2")]


@pytest.mark.parametrize("line, message", [
    ('{"image": "crop.png"}', "line 1: no expression"), ('{"expression": "x"}', "line 1: no image"),
    ('{"image": "gone.png", "expression": "x"}', "line 1: image gone.png not found"),
    ('{"image": "../crop.png", "expression": "x"}', "leaves the image folder"),
    ('{"image": "crop.png", "expression": [1]}', "expression is not text"), ("[1, 2]", "not a JSON object"),
    ("{", "not JSON"), ("", "empty"), ('{"image": "crop.png", "expression": " "}', "is empty"),
    ('{"image": "crop.png", "expression": "x", "expression_id": {}}\n7', "line 2: not a JSON object")])
def test_a_broken_file_of_questions_is_one_sentence(line, message, crop, tmp_path, capsys):
    crop.save(tmp_path / "crop.png")
    (tmp_path / "q.jsonl").write_text(line)
    assert main(["predict", str(tmp_path / "q.jsonl")]) == 2
    said = capsys.readouterr().err.strip()
    assert message in said and "\n" not in said


def words_of(case, folder):
    """The words of a wrong call, with files in `folder`."""
    Image.new("RGB", (20, 20)).save(folder / "good.png")
    Image.new("RGB", (900, 3)).save(folder / "long.png")
    (folder / "cut.png").write_bytes((folder / "good.png").read_bytes()[:50])
    (folder / "text.png").write_text("no picture")
    (folder / "there.png").write_text("precious")
    return [str(folder / w) if w.endswith((".png", "/", "picture")) else w for w in case]


@pytest.mark.parametrize("case, message", [
    (["gone.png", "the plane"], "gone.png not found"), (["good.png"], "an expression is missing"),
    (["good.png", "good.png"], "an expression is missing"),
    (["good.png", ""], "is empty"), (["text.png", "the plane"], "text.png cannot be read as an image"),
    (["long.png", "the plane"], "cannot resize an image of 900x3"),
    (["cut.png", "the plane"], "cut off or broken"), (["x/", "the plane"], "not found"),
    (["good.png", "the plane", "--out", "there.png"], "exists already"),
    (["good.png", "the plane", "--out", "x/y.png"], "is not a folder"),
    (["good.png", "the plane", "--out", "picture"], "a .png file is needed"),
    (["good.png", "good.png", "the plane", "--out", "new.png"], "a new folder for several"),
    (["good.png", "the plane", "--model", "x/"], "cannot be read here")])
def test_a_wrong_call_is_one_sentence_and_exit_code_2(case, message, tmp_path, capsys):
    assert main(["predict", *words_of(case, tmp_path)]) == 2
    said = capsys.readouterr().err.strip()
    assert message in said and "\n" not in said
    assert (tmp_path / "there.png").read_text() == "precious" and not (tmp_path / "new.png").exists()


def test_an_answer_without_a_box_says_why(monkeypatch, crop, tmp_path, capsys):
    monkeypatch.setattr("rsground_nb.evaluate.generate_answers",
                        lambda model, processor, images, questions, **kwargs: ["\x1b[31mno idea"]
                        * len(questions))
    crop.save(tmp_path / "crop.png")
    assert main(["predict", str(tmp_path / "crop.png"), "the plane", "--out", str(tmp_path / "o.png")]) == 0
    said = capsys.readouterr().out
    assert "no box: no <answer>" in said and "\x1b" not in said and (tmp_path / "o.png").is_file()


def test_a_question_row_has_no_truth(crop, tmp_path):
    crop.save(tmp_path / "crop.png")
    row = question_row(tmp_path / "crop.png", " the plane ", "a", student_codec())
    assert (row["expression"] == "the plane" and (row["width"], row["height"]) == (192, 192)
            and "box" not in row)
    with pytest.raises(ValueError, match="not UTF-8"):
        question_row(tmp_path / "crop.png", "the \udce9", "a", student_codec())
