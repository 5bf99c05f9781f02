"""Questions about detection datasets: true whatever is doubtful, of the right hops, read back by load_data;
bad input is named and nothing is written over."""
import json
import os
from collections import Counter

import numpy as np
import pytest
from PIL import Image

from rsground_nb.boxes import Codec
from rsground_nb.cot import rule_drafts
from rsground_nb.data import load_data, load_folder, split_hash
from rsground_nb.filters import find_faults
from rsground_nb.grammar import hops, parse_expression
from rsground_nb.refer import (SMALLEST, load_real_samples, look, read_detections, refer, windows_of,
                               write_refer)
from rsground_nb.run import main
from rsground_nb.scale import get_scale
from rsground_nb.sentences import RULES, Picture, Seen, check_expression, count_hops

SIDE = 300


def draw(path, width=SIDE, height=SIDE):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (height, width, 3), dtype=np.uint8)).save(path)


def coco(root, pictures, categories=("plane", "large-vehicle"), more=(), split="train"):
    """A COCO folder; `pictures` is a list of lists of (category number, x, y, width, height, flags)."""
    for k in range(len(pictures)): draw(root / split / f"{k}.jpg")
    annotations = [dict(id=100 * k + j, image_id=k, category_id=c, bbox=[x, y, w, h],
                        **(flags[0] if flags else {}))
                   for k, boxes in enumerate(pictures) for j, (c, x, y, w, h, *flags) in enumerate(boxes)]
    whole = dict(images=[dict(id=k, file_name=f"{k}.jpg", width=SIDE, height=SIDE)
                         for k in range(len(pictures))],
                 categories=[dict(id=k, name=c) for k, c in enumerate(categories)],
                 annotations=[*annotations, *more])
    (root / split / "_annotations.coco.json").write_text(json.dumps(whole))
    return root


FLEET = [(0, 20, 20, 40, 40), (0, 100, 30, 40, 40), (0, 90, 90, 60, 60), (1, 30, 220, 20, 20),
         (1, 230, 200, 50, 50)]


@pytest.fixture
def fleet(tmp_path): return coco(tmp_path / "fleet", [FLEET, FLEET[:3], [(0, 100, 100, 30, 30)]])


def row(box, category="plane", **more):
    return dict(image="a.jpg", image_id="a.jpg", split="train", width=SIDE, height=SIDE, category=category,
                box=list(box), file="a.json", line=None, where="", **more)


def texts(rows, **options):
    """All sentences of one picture, seen through the rules."""
    from rsground_nb.sentences import sentences
    return {text for text, _, _ in sentences(look(rows, (0, 0, SIDE, SIDE))[1])}


# --- what is asked

def test_a_folder_becomes_a_dataset_that_load_data_reads(fleet, tmp_path):
    rows, refused, findings = write_refer(fleet, tmp_path / "out", (150,), seed=1)
    splits, odd = load_data(str(tmp_path / "out"), get_scale("smoke"), 0)
    read = splits["train"]
    assert odd == findings == [] and len(read) == len(rows) > 6 and set(read["hops"]) == {1, 2, 3}
    for mine, its in zip(rows, read):
        assert its["image"].size == (its["width"], its["height"]) == (mine["width"], mine["height"])
        assert [its[k] for k in ("expression", "box", "objects", "hops", "split")] == [
            mine[k] for k in ("expression", "box", "objects", "hops", "split")]
        assert its["category"] in ("plane", "large vehicle") and its["source"].partition(":")[2] in RULES
    lines = [json.loads(line) for line in (tmp_path / "out" / "train.jsonl").read_text().splitlines()]
    assert all(line["origin"]["file"] == "train/_annotations.coco.json"
               and line["origin"]["where"].startswith("annotation") for line in lines)
    assert json.loads((tmp_path / "out" / "counts.json").read_text())["refused"] == dict(refused)


def test_every_row_is_true_of_its_objects(fleet):
    rows, _ = refer(read_detections(fleet)[0], (100, 150, 200), seed=3)
    for r in rows:
        things = [Seen(o["category"], tuple(o["box"])) for o in r["objects"]]
        whole = Picture(r["width"], r["height"], things, categories=("plane", "large vehicle"))
        assert [list(t.box) for t in check_expression(r["expression"], whole)] == [r["box"]], r
        assert r["hops"] == count_hops(r["expression"], ("large vehicle", "plane"))
        x, y = (r["window"] or (0, 0))[:2]
        assert r["origin"]["box"] == [v + (x, y)[k % 2] for k, v in enumerate(r["box"])]


def test_cut_pictures_hold_the_pixels_of_their_window(fleet, tmp_path):
    for k in range(3): Image.open(fleet / "train" / f"{k}.jpg").save(fleet / "train" / f"{k}.png")
    about = json.loads((fleet / "train" / "_annotations.coco.json").read_text())
    for image in about["images"]: image["file_name"] = image["file_name"].replace("jpg", "png")
    (fleet / "train" / "_annotations.coco.json").write_text(json.dumps(about))
    rows, *_ = write_refer(fleet, tmp_path / "out", (150,))
    for mine, its in zip(rows, load_folder(tmp_path / "out")[0]["train"]):
        whole = Image.open(fleet / "train" / mine["image_id"])
        assert np.array_equal(np.asarray(its["image"]),
                              np.asarray(whole.crop(mine["window"]) if mine["window"] else whole))


def test_the_same_seed_gives_the_same_rows_and_other_pictures_change_nothing(fleet):
    found = read_detections(fleet)[0]
    all_of_them, _ = refer(found, (150,), seed=5)
    assert all_of_them == refer(found, (150,), seed=5)[0] != refer(found, (150,), seed=6)[0]
    alone, _ = refer([r for r in found if r["image_id"] == "1.jpg"], (150,), seed=5)
    assert alone == [r for r in all_of_them if r["image_id"] == "1.jpg"] and alone


def test_no_sentence_speaks_of_colour(fleet):
    rows, _ = refer(read_detections(fleet)[0], (150, 200))
    assert all(o["colour"] is None for r in rows for o in r["objects"])


def test_windows_cover_the_picture():
    for width, height, size in ((600, 300, 256), (257, 256, 256), (100, 100, 33)):
        seen = np.zeros((height, width), bool)
        for x1, y1, x2, y2 in windows_of(width, height, (size,)):
            assert 0 <= x1 and x2 <= width and 0 <= y1 and y2 <= height and x2 - x1 == y2 - y1 == size
            seen[y1:y2, x1:x2] = True
        assert seen.all()


# --- what is doubtful

A, B = (20, 100, 60, 140), (200, 100, 240, 140)


def test_without_doubt_both_ends_and_the_count_are_said():
    assert {"the leftmost plane", "the rightmost plane", "the rightmost of the two planes"} <= texts([row(A),
                                                                                                      row(B)])


@pytest.mark.parametrize("doubtful, silenced, still", [
    # touches the border
    (row((255, 90, 299, 150)), "the rightmost plane", "the leftmost plane"),
    (row((100, 20, 107, 27)), "the leftmost of the three planes", "the leftmost plane"),              # tiny
    (row((260, 20, 290, 50), doubtful="difficult"), "the rightmost plane", "the leftmost plane"),
    (row((120, 10, 270, 90), doubtful="crowd"), "the rightmost plane", "the leftmost plane"),
    (row((150, 220, 290, 299), doubtful="truncated"), "the rightmost plane", "the leftmost plane")])
def test_a_doubtful_object_silences_what_it_could_make_false(doubtful, silenced, still):
    said = texts([row(A), row(B), doubtful])
    assert silenced not in said and still in said
    assert not any("of the" in text and "planes" in text for text in said)


def test_a_crowd_may_be_anywhere_in_its_box():
    """No plane of the pair is alone in its third, whatever the crowd's centre is."""
    crowd = row((0, 0, SIDE, SIDE), doubtful="crowd")
    assert texts([row(A), row(B), crowd]) == set()
    assert "the large vehicle" in texts([row(A, "large vehicle"), crowd])


def test_doubtful_objects_are_never_asked_for():
    odd = [row((0, 10, 40, 50)), row((100, 100, 105, 140)), row((200, 200, 240, 240), doubtful="difficult")]
    rows, refused = refer(odd)
    assert rows == [] and refused == {"object that is doubtful: touches the border": 1,
                                      f"object that is doubtful: smaller than {SMALLEST} px": 1,
                                      "object that is doubtful: difficult": 1,
                                      "picture without a sure object": 1}


def test_an_object_cut_by_a_window_is_doubtful_there():
    picture, rules, why = look([row(A), row(B)], (40, 0, 300, 260))
    assert (why == ["cut by the window", ""] and picture.things[0].visible == 0.5
            and not picture.things[0].sure)
    assert picture.things[0].box == (0, 100, 20, 140) and picture.things[1].box == (160, 100, 200, 140)
    assert len(rules.things) > 2


def test_sentences_hold_with_and_without_each_doubtful_object():
    rng, checked = np.random.default_rng(0), 0
    for _ in range(60):
        rows = [row((x, y, x + w, y + w), doubtful=rng.choice([None, None, "difficult"]))
                for x, y, w in zip(*rng.integers(0, 240, (2, 6)), rng.integers(14, 60, 6))]
        for asked in refer(rows, (150,), seed=0)[0]:
            window = asked["window"] or (0, 0, SIDE, SIDE)
            picture, _, why = look([dict(r, category="plane") for r in rows], window)
            for left_out in [t for t, reason in zip(picture.things, why) if reason][:4]:
                fewer = Picture(*picture.size, [t for t in picture.things if t is not left_out],
                                categories=("plane",))
                assert [list(t.box) for t in check_expression(asked["expression"], fewer)] == [asked["box"]]
                checked += 1
    assert checked > 100


# --- formats

def test_yolo_and_voc_are_read(tmp_path):
    draw(tmp_path / "y" / "images" / "train" / "a.png")
    (tmp_path / "y" / "labels" / "train").mkdir(parents=True)
    (tmp_path / "y" / "labels" / "train" / "a.txt").write_text("0 0.2 0.5 0.1 0.1\n0 0.8 0.5 0.1 0.1\n")
    (tmp_path / "y" / "classes.txt").write_text("Small_Vehicles\n")
    rows, *_ = write_refer(tmp_path / "y", tmp_path / "out_y")
    assert {r["category"] for r in rows} == {"small vehicle"} and rows
    draw(tmp_path / "v" / "JPEGImages" / "a.jpg")
    (tmp_path / "v" / "Annotations").mkdir()
    objects = "".join(f"<object><name>ship</name>{flag}<bndbox><xmin>{x}</xmin><ymin>100</ymin>"
                      f"<xmax>{x + 40}</xmax><ymax>140</ymax></bndbox></object>"
                      for x, flag in ((20, ""), (120, ""), (240, "<difficult>1</difficult>")))
    (tmp_path / "v" / "Annotations" / "a.xml").write_text(
        f"<annotation><filename>a.jpg</filename><size><width>{SIDE}</width><height>{SIDE}</height>"
        f"<depth>3</depth></size>{objects}</annotation>")
    rows, refused, _ = write_refer(tmp_path / "v", tmp_path / "out_v")
    assert (refused["object that is doubtful: difficult"] == 1 and rows
            and all("rightmost" not in r["expression"] for r in rows))


def test_a_dataset_without_all_objects_is_refused(tmp_path):
    draw(tmp_path / "d" / "a.jpg")
    (tmp_path / "d" / "train.jsonl").write_text(json.dumps(dict(image="a.jpg", expression="the ship",
                                                                box=[1, 1, 30, 30])))
    with pytest.raises(ValueError,
                       match="is read as jsonl: boxes of all objects are needed, as in coco, yolo, voc"):
        write_refer(tmp_path / "d", tmp_path / "out")


def test_dota_labels_are_read(tmp_path):
    draw(tmp_path / "d" / "images" / "a.png")
    (tmp_path / "d" / "labelTxt").mkdir()
    def corners(x, y, s=40): return f"{x} {y} {x + s} {y} {x + s} {y + s} {x} {y + s}"
    lines = ["imagesource:GoogleEarth", "gsd:0.5", f"{corners(20, 100)} small-vehicle 0",
             f"{corners(120, 100)} small-vehicle 0", f"{corners(240, 100)} small-vehicle 1",
             f"{corners(100, 20)} ship 0"]
    (tmp_path / "d" / "labelTxt" / "a.txt").write_text("\n".join(lines))
    rows, refused, _ = write_refer(tmp_path / "d", tmp_path / "out", (150,))
    assert (refused["object that is doubtful: difficult"] == 1
            and all("rightmost" not in r["expression"] for r in rows))
    assert ({r["category"] for r in rows} <= {"small vehicle", "ship"}
            and all(len(r["polygon"]) == 8 for r in rows) and rows)


# --- bad input

def test_bad_boxes_are_counted_and_the_rest_is_used(tmp_path):
    more = [dict(id=1, image_id=0, category_id=0, bbox=[400, 400, 20, 20]),
            dict(id=2, image_id=0, category_id=0, bbox=[50, 50, 0, 20]),
            dict(id=3, image_id=0, category_id=9, bbox=[5, 50, 20, 20]),
            dict(id=4, image_id=7, category_id=0, bbox=[5, 50, 20, 20]),
            dict(id=5, image_id=0, category_id=0, bbox=[5, 50, "wide", 20]),
            dict(id=6, image_id=0, category_id=0, bbox=[20, 20, 40, 40])]
    rows, refused, findings = write_refer(coco(tmp_path / "d", [FLEET], more=more), tmp_path / "out", (1000,))
    assert rows and {"outside", "no area", "missing image", "not a number"} <= set(refused)
    assert refused["window larger than the picture"] == 1 and refused["box annotated twice"] == 1
    assert any("no category with id 9" in str(f) for f in findings)


def test_nothing_is_written_over_and_nothing_is_left_half_written(fleet, tmp_path, capsys, monkeypatch):
    (tmp_path / "kept").mkdir()
    for out in (tmp_path / "kept", fleet / "out", tmp_path / "no" / "out"):
        with pytest.raises(ValueError, match="exists already|inside the dataset|not a folder"):
            write_refer(fleet, out)
    monkeypatch.setattr("rsground_nb.refer.write_audit",
                        lambda *_: (_ for _ in ()).throw(OSError(28, "No space left on device")))
    assert main(["data", "refer", str(fleet), str(tmp_path / "new"), "--window", "150"]) == 2
    assert "No space left" in capsys.readouterr().err
    assert sorted(p.name for p in tmp_path.iterdir()) == ["fleet", "kept"]


def test_a_picture_that_cannot_be_cut_is_counted(fleet, tmp_path):
    whole = write_refer(fleet, tmp_path / "whole", (150,))[0]
    assert any(r["window"] for r in whole if r["image_id"] == "0.jpg")
    (fleet / "train" / "0.jpg").write_bytes((fleet / "train" / "0.jpg").read_bytes()[:2000])
    rows, refused, _ = write_refer(fleet, tmp_path / "out", (150,))
    lost = [r for r in whole if r["image_id"] == "0.jpg"]
    assert (len(rows) == len(whole) - len(lost)
            and refused["sentence about a picture that cannot be read"] == len(lost))


def test_pictures_that_are_missing_are_findings(fleet, tmp_path):
    os.remove(fleet / "train" / "1.jpg")
    rows, refused, findings = write_refer(fleet, tmp_path / "out")
    assert refused["missing image"] > 0 and {r["image_id"] for r in rows} == {"0.jpg", "2.jpg"}


@pytest.mark.parametrize("options, said", [(["--window", "0"], "windows must be at least 1 px, not 0"),
                                           (["--hops", "4"], "hops must be 1, 2 or 3, not 4"),
                                           (["--smallest", "-1"], "smallest must be at least 0 px, not -1"),
                                           (["--seed", "-1"], "seed -1 is negative"),
                                           (["--smallest", "500"], "no sentence about 9 objects"),
                                           (["--format", "foo"], "unknown format 'foo'")])
def test_bad_options_are_one_sentence(fleet, tmp_path, capsys, options, said):
    assert main(["data", "refer", str(fleet), str(tmp_path / "out"), *options]) == 2
    error = capsys.readouterr().err
    assert said in error and error.count("\n") == 1 and not (tmp_path / "out").exists()


def test_the_command_tells_counts_and_hashes(fleet, tmp_path, capsys):
    assert (main(["data", "refer", str(fleet), str(tmp_path / "out"), "--window", "150", "--samples", "3"])
            == 0)
    said = capsys.readouterr().out
    assert (split_hash(load_folder(tmp_path / "out")[0]["train"]) in said
            and "window with fewer than two sure objects" in said)
    page = (tmp_path / "out" / "audit.html").read_text()
    assert page.count("<svg") == 3


# --- the samples of the package

def test_real_samples_are_few_small_and_public_domain():
    samples = load_real_samples()
    assert (30 <= len(samples) <= 40 and set(samples["split"]) == {"test"}
            and Counter(samples["hops"]).keys() == {1, 2, 3})
    folder = os.path.dirname(__import__("rsground_nb").__file__) + "/assets/real"
    assert sum(e.stat().st_size for e in os.scandir(folder)) <= 1_500_000
    # the other source is not public domain
    assert all(name.startswith("airport_") for name in samples["image_id"])
    assert "Public Domain" in open(folder + "/LICENSE.md", encoding="utf-8").read()
    for r in samples:
        assert r["image"].size == (r["width"], r["height"]) and r["box"] in [o["box"] for o in r["objects"]]


def test_real_samples_come_from_the_test_split_and_from_public_domain_pictures(shared):
    whole = json.loads((shared / "aerial_planes" / "test" / "_annotations.coco.json").read_text())
    free = {i["file_name"] for i in whole["images"] if i["source"] == "GDIT Aerial Airport"
            and i["license"] == 2}
    assert {k["name"] for k in whole["licenses"] if k["id"] == 2} == {"Public Domain"}
    assert set(load_real_samples()["image_id"]) <= free


def test_the_rule_teacher_thinks_through_every_real_sample():
    samples, codec = load_real_samples(), Codec("qwen3_vl", max_pixels=200704)
    for row, draft in zip(samples.remove_columns("image"), rule_drafts(samples, codec)):
        assert (draft.thought
                and find_faults(draft.completion, row, codec, thought=draft.thought) == []), row["expression"]
        assert hops(parse_expression(row["expression"])) == row["hops"]
