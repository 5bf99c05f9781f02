"""Every layout, on small folders made here."""
import json
import pickle
import shutil

import numpy as np
import pytest
from hypothesis import given, settings, strategies as st
from PIL import Image

from rsground_nb.files import LAYOUTS, coco_runs, files_of, guess_format, read_index, read_rows, read_xml
from rsground_nb.folders import load_folder
from rsground_nb.reading import Defect, ImageFolder, number, open_pickle
from rsground_nb.shapes import decode_mask, encode_mask, mask_box, run_lengths

OBJECT = ("<object><name>{}</name><bndbox><xmin>{}</xmin><ymin>{}</ymin><xmax>{}</xmax><ymax>{}</ymax>"
          "</bndbox>{}</object>\n")


def picture(path, size=(64, 48)):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, "grey").save(path)


def mask_picture(path, box, size=(64, 48)):
    path.parent.mkdir(parents=True, exist_ok=True)
    mask = np.zeros((size[1], size[0]), np.uint8)
    mask[box[1]:box[3], box[0]:box[2]] = 255
    Image.fromarray(mask).save(path)
    return mask > 0


def write(path, text):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text if isinstance(text, str) else json.dumps(text))


def annotation(root, stem, objects):
    picture(root / "JPEGImages" / f"{stem}.jpg")
    write(root / "Annotations" / f"{stem}.xml", f"<annotation><filename>{stem}.jpg</filename><size>"
          f"<width>64</width><height>48</height></size>\n{''.join(objects)}</annotation>")


def coco_file(annotations):
    return dict(images=[dict(id=1, file_name="a.jpg", width=64, height=48)],
                categories=[dict(id=1, name="ship"), dict(id=2, name="bridge")], annotations=annotations)


def make_dior(root):
    annotation(root, "00007",
               [OBJECT.format("ship", 1, 2, 30, 20, "<description>The left ship</description>"),
                OBJECT.format("ship", 40, 2, 60, 20, "<description>The right ship</description>")])
    annotation(root, "00009",
               [OBJECT.format("bridge", 5, 5, 50, 40, "<description>The bridge</description>")])
    write(root / "train.txt", "0\n2\n")
    write(root / "test.txt", "1\n")
    return [("train", "The left ship", [1, 2, 30, 20]), ("train", "The bridge", [5, 5, 50, 40]),
            ("test", "The right ship", [40, 2, 60, 20])]


def make_opt(root):
    expected = make_dior(root)
    (root / "JPEGImages").rename(root / "Image")
    (root / "split").mkdir()
    for name in ("train.txt", "test.txt"): (root / name).rename(root / "split" / name)
    return expected


def make_rsvg_hr(root):
    picture(root / "images" / "a.jpg", (1024, 1024))
    write(root / "Annotations" / "rsvg_hr_train.txt", "a.jpg,1.5,2,30,20,find a pool, left of a road\n")
    write(root / "Annotations" / "rsvg_hr_test.txt", "a.jpg,5,5,50,40,a court\n")
    return [("train", "find a pool, left of a road", [1.5, 2, 30, 20]), ("test", "a court", [5, 5, 50, 40])]


def make_vrsbench(root):
    for part in ("Images_train", "Images_val"): picture(root / part / f"{part}.png", (512, 512))
    turns = [{"from": "human", "value": "<image>\n[vqa] how many?"}, {"from": "gpt", "value": "2"},
             {"from": "human", "value": "[refer] where is <p>the ship</p>"},
             {"from": "gpt", "value": "{<25><50><75><100>}"}]
    write(root / "VRSBench_train.json", [dict(id=0, image="Images_train.png", conversations=turns)])
    write(root / "VRSBench_EVAL_referring.json",
          [dict(image_id="Images_val.png", question="The bridge", ground_truth="{<0><25><50><75>}",
                question_id=7, type="ref", unique=True, obj_corner=[0, .25, .5, .25, .5, .75, 0, .75],
                obj_cls="bridge")])
    return [("train", "the ship", [128, 256, 384, 512]), ("test", "The bridge", [0, 128, 256, 384])]


def make_vrsbench_objects(root):
    picture(root / "Images_train" / "P1.png", (512, 512))
    write(root / "Annotations_train" / "P1.json", dict(image="P1.png", caption="", objects=[
        dict(obj_id=0, obj_cls="ship", obj_coord=[.25, .5, .75, 1],
             obj_corner=[.25, .5, .75, .5, .75, 1, .25, 1], referring_sentence="The ship at the bottom")]))
    return [("train", "The ship at the bottom", [128, 256, 384, 512])]


def make_refgeo(root):
    picture(root / "images" / "avvg" / "a.jpg")
    mask_picture(root / "masks" / "avvg" / "a_3.png", (5, 6, 30, 25))
    row = dict(dataset="avvg", image_id="a.jpg", question_id=3, question="the car", bbox=[5, 6, 30, 25],
               poly=[[5, 6], [30, 6], [30, 25], [5, 25]])
    write(root / "metainfo" / "avvg_train.jsonl", json.dumps(row) + "\n")
    return [("train", "the car", [5, 6, 30, 25])]


def make_refer(root):
    picture(root / "images" / "rrsisd" / "JPEGImages" / "a.jpg")
    mask = np.zeros((48, 64), bool)
    mask[6:25, 5:30] = True
    counts = run_lengths(json.loads(encode_mask(mask))["counts"])
    write(root / "rrsisd" / "instances.json",
          coco_file([dict(id=9, image_id=1, category_id=1, bbox=[0, 0, 1, 1],
                          segmentation=[dict(size=[48, 64], counts=counts)])]))
    refs = [dict(ref_id=1, ann_id=9, image_id=1, split="val",
                 sentences=[dict(sent_id=4, sent="the ship"), dict(sent_id=5, sent="a ship")])]
    (root / "rrsisd" / "refs(unc).p").write_bytes(pickle.dumps(refs, protocol=2))
    return [("val", "the ship", [5, 6, 30, 25]), ("val", "a ship", [5, 6, 30, 25])]


def make_phrases(root):
    picture(root / "images" / "12.tif")
    mask_picture(root / "masks" / "12.tif", (5, 6, 30, 25))
    write(root / "output_phrase_train.txt", "12 the road on the left\n")
    return [("train", "the road on the left", [5, 6, 30, 25])]


def make_risbench(root):
    picture(root / "img_rgb" / "train_0_3.png")
    mask_picture(root / "mask" / "train_0_3.png", (5, 6, 30, 25))
    write(root / "output_phrase_val.txt", "train_0_3.png the road on the left\n")
    return [("val", "the road on the left", [5, 6, 30, 25])]


def make_yolo(root):
    picture(root / "images" / "train" / "a.png", (100, 200))
    write(root / "labels" / "train" / "a.txt", "0 0.5 0.5 0.2 0.2\n1 0.2 0.2 0.1 0.1\n1 0.8 0.2 0.1 0.1\n")
    write(root / "classes.txt", "ship\ncar\n")
    return [("train", "the ship", [40, 80, 60, 120])]


def make_dota(root):
    picture(root / "train" / "images" / "P1.png")
    write(root / "train" / "labelTxt" / "P1.txt",
          "imagesource:GoogleEarth\ngsd:0.14\n5 6 30 6 30 25 5 25 ship 0\n1 1 9 1 9 9 1 9 small-vehicle 1\n")
    return [("train", "the ship", [5, 6, 30, 25]), ("train", "the small-vehicle", [1, 1, 9, 9])]


def make_coco(root):
    picture(root / "images" / "a.jpg")
    write(root / "annotations" / "instances_train.json", coco_file([
        dict(id=1, image_id=1, category_id=1, bbox=[5, 6, 25, 19],
             segmentation=[[5, 6, 30, 6, 30, 25, 5, 25]]),
        dict(id=2, image_id=1, category_id=2, bbox=[1, 1, 9, 9]),
        dict(id=3, image_id=1, category_id=2, bbox=[30, 1, 9, 9]),
        dict(id=4, image_id=1, category_id=2, bbox=[40, 1, 9, 9], caption="the bridge on the right")]))
    return [("train", "the ship", [5, 6, 30, 25]), ("train", "the bridge on the right", [40, 1, 49, 10])]


def make_jsonl(root):
    picture(root / "a.jpg")
    rows = [dict(image="a.jpg", expression="the ship", box=[1, 2, 30, 20]),
            dict(id=1, image="a.jpg", conversations=[
                {"from": "human", "value": "<image>\nGive the box this sentence describes: the car."},
                {"from": "gpt", "value": '{"bbox_2d": [5, 6, 30, 25]}'}]),
            dict(images=["a.jpg"], problem="<image>the bridge", answer=dict(bbox=[4, 4, 9, 9]))]
    write(root / "train.jsonl", "\n".join(map(json.dumps, rows)))
    return [("train", "the ship", [1, 2, 30, 20]), ("train", "the car.", [5, 6, 30, 25]),
            ("train", "the bridge", [4, 4, 9, 9])]


def make_voc(root):
    annotation(root, "a", [OBJECT.format("ship", 1, 2, 30, 20, ""), OBJECT.format("car", 1, 30, 9, 40, ""),
                           OBJECT.format("car", 20, 30, 30, 40, "")])
    return [("train", "the ship", [1, 2, 30, 20])]


def make_voc_turned(root):
    annotation(root, "a", [])
    corners = zip(("left_top", "right_top", "right_bottom", "left_bottom"),
                  ((5, 6), (30, 6), (30, 25), (5, 25)))
    turned = "".join(f"<x_{c}>{x}</x_{c}><y_{c}>{y}</y_{c}>" for c, (x, y) in corners)
    text = ("<annotation><filename>a.jpg</filename><size><width>64</width><height>48</height></size><object>"
            f"<name>ship</name><robndbox>{turned}</robndbox></object></annotation>")
    write(root / "Annotations" / "Oriented Bounding Boxes" / "a.xml", text)
    (root / "Annotations" / "a.xml").unlink()
    return [("train", "the ship", [5, 6, 30, 25])]


MAKERS = {"dior_rsvg": make_dior, "rsvg_hr": make_rsvg_hr, "vrsbench": make_vrsbench,
          "vrsbench_objects": make_vrsbench_objects, "refgeo": make_refgeo, "refer": make_refer,
          "phrases": make_phrases, "yolo": make_yolo, "coco": make_coco, "jsonl": make_jsonl, "voc": make_voc,
          "dota": make_dota, "voc_turned": make_voc_turned}


def test_every_layout_is_tested_here(): assert set(MAKERS) == set(LAYOUTS)


@pytest.mark.parametrize("format, make", [*MAKERS.items(), ("dior_rsvg", make_opt),
                                          ("phrases", make_risbench)], ids=[*MAKERS, "opt_rsvg", "risbench"])
def test_a_layout_is_guessed_read_and_loaded(format, make, tmp_path):
    expected = make(tmp_path)
    guessed, rows, findings = read_rows(tmp_path, probe=True)
    assert guessed == format
    assert [(r["split"], r["expression"], pytest.approx(r["box"])) for r in rows] == expected
    assert ({f.kind for f in findings} <= {"ambiguous"}
            and len({r["expression_id"] for r in rows}) == len(rows))
    splits, _ = load_folder(tmp_path)
    for row in (r for rows in splits.values() for r in rows):
        assert row["image"].size == (row["width"], row["height"])
        if row["mask"]: assert decode_mask(row["mask"]).shape == (row["height"], row["width"])


@pytest.mark.parametrize("make", [make_refgeo, make_refer, make_phrases, make_coco])
def test_masks_fit_their_boxes(make, tmp_path):
    make(tmp_path)
    found = [r for r in read_rows(tmp_path)[1] if r["mask"]]
    assert found
    for row in found: assert mask_box(row["mask"]) == (5, 6, 30, 25)


def test_names_that_an_image_holds_twice_are_listed_not_read(tmp_path):
    make_yolo(tmp_path)
    found = read_rows(tmp_path)[2]
    assert [(str(f), f.rows) for f in found] == [("labels/train/a.txt, line 2, image images/train/a.png: 2 "
                                                  "objects are called 'the car'", 2)]
    assert [(r["category"], r["alike"]) for r in read_rows(tmp_path, detections=True)[1]] == [
        ("ship", 1), ("car", 2), ("car", 2)]


@pytest.mark.parametrize("case, message, kind", [("truncated.xml", "cut off", "unreadable"),
                                                 ("empty_file.xml", "empty annotation file", "unreadable"),
                                                 ("billion_laughs.xml", "entity declarations", "unreadable"),
                                                 ("not_utf8.xml", "not UTF-8 .byte 411", "unreadable")])
def test_a_broken_file_makes_the_counter_unknown(shared, tmp_path, case, message, kind):
    root = tmp_path / "mini"
    make_dior(root)
    shutil.copy(shared / "bad_inputs" / "dior_xml" / case, root / "Annotations" / "00008.xml")
    with pytest.raises(ValueError, match=message): load_folder(root)
    _, rows, findings = read_rows(root)
    assert (len(rows) == 3 and {r["split"] for r in rows} == {"unknown"}
            and {f.kind for f in findings} == {kind, "index"})


def test_a_bad_object_keeps_its_number(tmp_path):
    annotation(tmp_path, "a", [OBJECT.format("ship", 30, 2, 1, 20, "<description>Bad</description>"),
                               OBJECT.format("ship", 1, 2, 30, 20, "<description>Good</description>")])
    rows, findings = read_xml(tmp_path / "Annotations" / "a.xml", ImageFolder([tmp_path / "JPEGImages"]))
    assert (rows[0] is None and rows[1]["expression_id"] == "a:1"
            and [(f.line, f.where) for f in findings] == [(2, "object 0")])


@given(st.lists(st.integers(-3, 12) | st.text(alphabet="0123456789.x- ", max_size=4), max_size=20))
@settings(max_examples=200, deadline=None)
def test_every_line_of_an_index_is_used_or_listed(tmp_path_factory, lines):
    path = tmp_path_factory.mktemp("index") / "train.txt"
    path.write_text("\n".join(map(str, lines)))
    found, findings = read_index(path, 10)
    assert len(found) + len(findings) == sum(bool(str(line).strip()) for line in lines)
    assert all(0 <= n < 10 for n in found) and len(set(found)) == len(found)


@given(st.one_of(st.none(), st.booleans(), st.floats(), st.integers(), st.text(), st.lists(st.integers())))
def test_a_number_is_finite_or_a_defect(value):
    try: assert np.isfinite(number(value, "xmin"))
    except Defect as e: assert "xmin" in str(e)


@given(st.integers(1, 12), st.integers(1, 12), st.data())
def test_run_lengths_survive_both_forms(width, height, data):
    mask = (np.array(data.draw(st.lists(st.booleans(), min_size=width * height, max_size=width * height)))
            .reshape(height, width))
    text = encode_mask(mask)
    counts = run_lengths(json.loads(text)["counts"])
    assert (sum(counts) == width * height
            and coco_runs(dict(size=[height, width], counts=counts), width, height) == text
            == coco_runs(json.loads(text), width, height))


@given(st.text(max_size=30), st.integers(1, 9), st.integers(1, 9))
def test_hostile_run_lengths_are_a_mask_or_a_defect(counts, width, height):
    try:
        assert decode_mask(coco_runs(dict(size=[height, width], counts=counts), width, height)
                           or encode_mask(np.zeros((height, width)))).shape == (height, width)
    except Defect: pass


class Gadget:
    def __reduce__(self): return print, ("code from a pickle ran",)


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_a_pickle_runs_no_code(tmp_path, capsys, protocol):
    path = tmp_path / "refs.p"
    path.write_bytes(pickle.dumps([Gadget()], protocol=protocol))
    with pytest.raises(Defect, match="only plain containers"): open_pickle(path)
    assert capsys.readouterr().out == ""


def test_an_image_outside_its_folder_is_never_opened(tmp_path):
    picture(tmp_path / "secret.jpg")
    (tmp_path / "images").mkdir()
    (tmp_path / "images" / "link.jpg").symlink_to(tmp_path / "secret.jpg")
    (tmp_path / "images" / "sub").symlink_to(tmp_path)
    images = ImageFolder([tmp_path / "images"])
    for name in ("link.jpg", "../secret.jpg", str(tmp_path / "secret.jpg"), "sub/secret.jpg",
                 "..\\secret.jpg", "", ".", "\0"):
        with pytest.raises(Defect): images.find(name)


def test_single_files_are_guessed(tmp_path):
    for name, make in MAKERS.items(): make(tmp_path / name)
    cases = {"dior_rsvg": "dior_rsvg/Annotations/00007.xml",
             "rsvg_hr": "rsvg_hr/Annotations/rsvg_hr_test.txt",
             "vrsbench": "vrsbench/VRSBench_EVAL_referring.json",
             "refgeo": "refgeo/metainfo/avvg_train.jsonl", "refer": "refer/rrsisd/refs(unc).p",
             "phrases": "phrases/output_phrase_train.txt", "yolo": "yolo/labels/train/a.txt",
             "coco": "coco/annotations/instances_train.json", "jsonl": "jsonl/train.jsonl",
             "voc": "voc/Annotations/a.xml", "dota": "dota/train/labelTxt/P1.txt",
             "index": "dior_rsvg/train.txt", "vrsbench_objects": "vrsbench_objects/Annotations_train/P1.json"}
    assert {name: guess_format(tmp_path / path) for name, path in cases.items()} == {name: name
                                                                                     for name in cases}


ODD = [None, [], {}, "", "x", True, -1, 0, 1e400, "9" * 5000, [None], {"id": None}, [[1, 2], 3], "../a", 7.5,
       "NaN"]


def mutated_json(value, rng):
    """The value with one of its parts replaced by something that does not belong there."""
    if not isinstance(value, (dict, list)) or not value or rng.random() < 0.1:
        return ODD[rng.integers(len(ODD))]
    keys = list(value) if isinstance(value, dict) else list(range(len(value)))
    k = keys[rng.integers(len(keys))]
    return ({**value, k: mutated_json(value[k], rng)} if isinstance(value, dict)
            else [mutated_json(v, rng) if i == k else v for i, v in enumerate(value)])


def mutated_bytes(data, rng):
    """The bytes with a piece removed, doubled or overwritten."""
    a, b = sorted(rng.integers(0, len(data) + 1, 2))
    return (data[:a] + data[b:], data[:b] + data[a:],
            data[:a] + bytes(rng.integers(0, 256, 3).tolist()) + data[a:])[rng.integers(3)]


@pytest.mark.parametrize("format", MAKERS)
def test_broken_files_give_findings_and_never_an_exception(format, tmp_path):
    MAKERS[format](tmp_path)
    rng = np.random.default_rng(0)
    files = [f for _, f in files_of(tmp_path, LAYOUTS[format])] + [
        f for f in [tmp_path / "rrsisd" / "instances.json", tmp_path / "train.txt", tmp_path / "classes.txt"]
        if f.is_file()]
    for file in files:
        whole = file.read_bytes()
        for k in range(300):
            data = mutated_bytes(whole, rng)
            if file.suffix == ".p" and k % 2: data = pickle.dumps(mutated_json(pickle.loads(whole), rng))
            elif file.suffix == ".json" and k % 2:
                data = json.dumps(mutated_json(json.loads(whole), rng)).encode()
            elif file.suffix == ".jsonl" and k % 2:
                data = b"\n".join(json.dumps(mutated_json(json.loads(line), rng)).encode()
                                  for line in whole.splitlines())
            file.write_bytes(data)
            for where in (tmp_path, file):
                if file.name not in ("instances.json", "train.txt", "classes.txt") or where == tmp_path:
                    _, rows, findings = read_rows(where, format)
                    assert all(len(r["box"]) == 4 and r["box"][0] < r["box"][2] and r["expression"]
                               and str(r["image_id"]) for r in rows)
        file.write_bytes(whole)


def kinds(path, format=None, **options): return [f.kind for f in read_rows(path, format, **options)[2]]


def test_a_system_turn_before_the_question_loses_no_row(tmp_path):
    turns = [{"from": "system", "value": "You are helpful."},
             {"from": "human", "value": "[refer] <p>the ship</p>"},
             {"from": "gpt", "value": "{<25><50><75><100>|<30>}"}]
    write(tmp_path / "VRSBench_train.json", [dict(id=0, image="a.png", note="x" * 9000, conversations=turns)])
    _, rows, findings = read_rows(tmp_path / "VRSBench_train.json")
    assert ([(r["expression"], r["box"]) for r in rows] == [("the ship", [128, 256, 384, 512])]
            and findings == [])


def test_images_of_another_size_change_the_boxes_that_are_shares_and_refuse_those_that_are_pixels(tmp_path):
    make_vrsbench(tmp_path / "a")
    picture(tmp_path / "a" / "Images_val" / "Images_val.png", (256, 256))
    picture(tmp_path / "a" / "Images_train" / "Images_train.png", (256, 256))
    assert [(r["width"], r["box"]) for r in read_rows(tmp_path / "a")[1]] == [(256, [64, 128, 192, 256]),
                                                                              (256, [0, 64, 128, 192])]
    make_rsvg_hr(tmp_path / "b")
    picture(tmp_path / "b" / "images" / "a.jpg", (800, 800))
    assert kinds(tmp_path / "b") == ["size mismatch"] * 2


def test_roboflow_folders_take_their_names_from_data_yaml(tmp_path):
    for part in ("train", "valid"):
        picture(tmp_path / part / "images" / "a.png", (100, 200))
        write(tmp_path / part / "labels" / "a.txt", "1 0.5 0.5 0.2 0.2\n7 0.5 0.5 0.2 0.2\n")
    write(tmp_path / "train" / "labels" / "empty.txt", "")
    write(tmp_path / "data.yaml", "names: [ship, car]\n")
    format, rows, findings = read_rows(tmp_path)
    assert format == "yolo" and [(r["split"], r["image_id"], r["expression"]) for r in rows] == [
        ("train", "train/images/a.png", "the car"), ("val", "valid/images/a.png", "the car")]
    assert [f.message for f in findings] == ["no class '7'"] * 2


def test_voc_takes_its_splits_from_imagesets(tmp_path):
    make_voc(tmp_path)
    annotation(tmp_path, "b", [OBJECT.format("plane", 1, 2, 30, 20, "")])
    write(tmp_path / "ImageSets" / "Main" / "train.txt", "a\n")
    write(tmp_path / "ImageSets" / "Main" / "test.txt", "b\n")
    assert [(r["split"], r["expression"]) for r in read_rows(tmp_path)[1]] == [("train", "the ship"),
                                                                               ("test", "the plane")]


def test_coco_folders_with_an_image_folder_per_split(tmp_path):
    for split in ("train", "val"):
        picture(tmp_path / f"{split}2017" / f"{split}.jpg")
        whole = coco_file([dict(id=1, image_id=1, category_id=1, bbox=[5, 6, 25, 19]),
                           dict(id=2, image_id=1, category_id=2, bbox=[5, 6, 25, 19], iscrowd=1),
                           dict(id=3, image_id=1, category_id=9, bbox=[5, 6, 25, 19])])
        whole["images"][0]["file_name"] = f"{split}.jpg"
        write(tmp_path / "annotations" / f"instances_{split}2017.json", whole)
    write(tmp_path / "annotations" / "captions_train2017.json",
          coco_file([dict(id=1, image_id=1, caption="a harbour")]))
    _, rows, findings = read_rows(tmp_path, probe=True)
    assert [(r["split"], r["image_id"]) for r in rows] == [("train", "train.jpg"), ("val", "val.jpg")]
    assert [f.kind for f in findings] == ["no expression"] * 2 + ["crowd"] * 2


def test_what_else_a_folder_looks_like_is_said(tmp_path):
    make_vrsbench(tmp_path)
    make_vrsbench_objects(tmp_path)
    assert [str(f) for f in read_rows(tmp_path)[2]] == [f"{tmp_path.name}: the "
                                                        "folder also looks like vrsbench_objects, which was "
                                                        "not read: use --format vrsbench_objects"]
    with pytest.raises(ValueError, match="holds no file of format coco"): read_rows(tmp_path, "coco")
    outer = tmp_path.parent / f"{tmp_path.name}_outer"
    make_vrsbench(outer / "inner")
    with pytest.raises(ValueError, match="the folder 'inner' in it looks like vrsbench"): read_rows(outer)


@pytest.mark.parametrize("segmentation",
                         [[[1, 2, 1e9, 4, 5, -1e9]], dict(size=[48, 64], counts=[4 * 10 ** 10, 5]),
                          dict(size=[48, 64], counts="o" * 20_000), dict(size={}, counts=[1]),
                          dict(size=[1], counts=5), [["x"] * 6], 5])
def test_a_segmentation_that_would_fill_the_memory_is_a_finding(tmp_path, segmentation):
    write(tmp_path / "a.json",
          coco_file([dict(id=1, image_id=1, category_id=1, bbox=[5, 6, 25, 19], segmentation=segmentation)]))
    assert kinds(tmp_path / "a.json")[0] in ("bad mask", "wrong fields", "not a number")


@pytest.mark.parametrize("size", [(200_000, 200_000), (-5, 48), (0, 48), (1e300, 48), ("x", 48)])
def test_a_declared_size_that_no_image_has_is_a_finding(tmp_path, size):
    whole = coco_file([dict(id=1, image_id=1, category_id=1, bbox=[5, 6, 25, 19],
                            segmentation=[[1, 2, 3, 4, 5, 60000]])])
    whole["images"][0].update(width=size[0], height=size[1])
    write(tmp_path / "a.json", whole)
    assert len(read_rows(tmp_path / "a.json")[1]) == 0 and len(read_rows(tmp_path / "a.json")[2]) == 1


def test_a_small_pickle_that_is_endless_when_printed_is_a_finding(tmp_path):
    nested = []
    for _ in range(60): nested = [nested] * 5
    make_refer(tmp_path)
    path = tmp_path / "rrsisd" / "refs(unc).p"
    for value in (nested, [nested], [dict(ann_id=nested, sentences=[nested])],
                  [dict(ann_id=9, split=nested, sentences=[dict(sent_id=nested, sent=nested)])]):
        path.write_bytes(pickle.dumps(value))
        assert path.stat().st_size < 2000 and kinds(tmp_path)


def test_annotation_files_that_are_links_pipes_or_folders_are_findings(tmp_path):
    import os

    make_dior(tmp_path / "mini")
    (tmp_path / "secret.txt").write_text("root:x:0\n")
    (tmp_path / "mini" / "val.txt").symlink_to(tmp_path / "secret.txt")
    (tmp_path / "mini" / "Annotations" / "00001.xml").symlink_to(tmp_path / "secret.txt")
    (tmp_path / "mini" / "Annotations" / "00002.xml").mkdir()
    (tmp_path / "mini" / "Annotations" / "00003.xml").symlink_to(tmp_path / "nowhere")
    os.mkfifo(tmp_path / "mini" / "Annotations" / "00004.xml")
    (tmp_path / "mini" / "Annotations" / "._00007.xml").write_bytes(b"\x00\x05")
    said = [str(f) for f in read_rows(tmp_path / "mini")[2]]
    assert ([s.split(": ")[1] for s in said[:4]] == ["link leaves its folder",
                                                     "not a plain file", "not found", "not a plain file"]
            and not any("root:x" in s for s in said))


def test_a_mask_cannot_be_taken_from_outside_and_is_not_decoded_before_its_size_is_known(tmp_path):
    make_refgeo(tmp_path)
    mask_picture(tmp_path.parent / "secret.png", (5, 6, 30, 25))
    (tmp_path / "masks" / "avvg" / "a_3").mkdir()
    row = json.loads((tmp_path / "metainfo" / "avvg_train.jsonl").read_text())
    write(tmp_path / "metainfo" / "avvg_train.jsonl",
          json.dumps({**row, "question_id": "3/../../../../secret"}))
    assert kinds(tmp_path) == ["unsafe"]
    write(tmp_path / "metainfo" / "avvg_train.jsonl", json.dumps(row))
    mask_picture(tmp_path / "masks" / "avvg" / "a_3.png", (5, 6, 30, 25), size=(3000, 3000))
    assert kinds(tmp_path) == ["bad mask"]


def test_a_file_name_cannot_talk_to_the_terminal(tmp_path):
    write(tmp_path / "rsvg_hr_train.txt", "b\x1b]0;t\x07.jpg,1,2,30,40,the pool\n")
    picture(tmp_path / "images" / "a.jpg", (1024, 1024))
    assert (all(c.isprintable() for f in read_rows(tmp_path)[2] for c in str(f))
            and kinds(tmp_path) == ["missing image"])


def test_a_missing_image_comes_with_a_hint(tmp_path):
    write(tmp_path / "rsvg_hr_train.txt", "A,1,2,30,40,the pool\n")
    picture(tmp_path / "images" / "a.JPG", (1024, 1024))
    assert "(there is a.JPG)" in str(read_rows(tmp_path)[2][0])


def test_a_namespace_and_odd_sizes_in_xml(tmp_path):
    annotation(tmp_path, "a", [OBJECT.format("ship", 1, 2, 30, 20, "<description>The ship</description>")])
    path = tmp_path / "Annotations" / "a.xml"
    text = path.read_text()
    path.write_text(text.replace("<annotation>", '<annotation xmlns="http://example.invalid/">'))
    assert len(read_rows(path)[1]) == 1
    for old, new, kind in (("<width>64<", "<width>64.9<", "size"), ("<width>64<", "<width>0<", "size"),
                           ("<filename>a.jpg</filename>", "", "no file name"),
                           ("<height>48</height>", "", "not a number")):
        path.write_text(text.replace(old, new))
        assert kinds(path) == [kind]


@pytest.mark.parametrize("field, value",
                         [("category", 5), ("category", 0), ("category", ["a"]), ("source", 1), ("split", 3),
                          ("mask", 3.5), ("mask", "junk"), ("expression", {"a": 1}), ("expression", 5),
                          ("expression", "\ud800"), ("image", ["a.jpg", "b.jpg"]), ("split", "x/../.."),
                          ("split", "a" * 41), ("split", "té"), ("width", 5e9), ("polygon", [1]),
                          ("objects", 3), ("objects", [1]), ("objects", [dict(category="ship")]),
                          ("objects", [dict(category="ship", box=[1, 2, 3])]),
                          ("objects", [dict(category="\ud800", box=[1, 2, 3, 4])])])
def test_a_field_of_the_wrong_kind_is_a_finding_and_loading_goes_on(tmp_path, field, value):
    picture(tmp_path / "a.jpg")
    good = dict(image="a.jpg", expression="the ship", box=[1, 2, 30, 20], width=64, height=48,
                category="ship")
    write(tmp_path / "train.jsonl", json.dumps(good) + "\n" + json.dumps({**good, field: value}))
    splits, findings = load_folder(tmp_path)
    assert len(splits["train"]) == 1 and findings[0].line == 2


def test_ambiguous_names_count_what_cannot_be_used(tmp_path):
    write(tmp_path / "a.json", coco_file([dict(id=1, image_id=1, category_id=1, bbox=[5, 6, 25, 19]),
                                          dict(id=2, image_id=1, category_id=1, bbox=[5, 6, 0, 19])]))
    assert sorted(kinds(tmp_path / "a.json")) == ["ambiguous", "no area"]


def test_the_image_of_the_right_split_is_found(tmp_path):
    for k, split in enumerate(("train", "val")):
        picture(tmp_path / f"{split}2017" / "a.jpg", (64 + k, 48))
        whole = coco_file([dict(id=1, image_id=1, category_id=1, bbox=[5, 6, 25, 19])])
        whole["images"][0]["width"] = 64 + k
        write(tmp_path / "annotations" / f"instances_{split}2017.json", whole)
    assert ([(r["split"], r["width"], r["image"].split("/")[-2]) for r in read_rows(tmp_path, probe=True)[1]]
            == [("train", 64, "train2017"), ("val", 65, "val2017")])


def test_names_of_yolo_classes(tmp_path):
    picture(tmp_path / "images" / "a.png", (100, 100))
    write(tmp_path / "labels" / "a.txt", "0 0.5 0.5 0.2 0.2\n1 0.2 0.2 0.1 0.1\n2 0.2 0.2 0.1 0.1\n")
    write(tmp_path.parent / "classes.txt", "outside\nfar\naway\n")
    assert [r["expression"] for r in read_rows(tmp_path)[1]] == [
        "the object of class 0", "the object of class 1", "the object of class 2"]
    write(tmp_path / "data.yaml", "names: {1: ship, 0: plane}\n")
    assert [r["expression"] for r in read_rows(tmp_path)[1]] == ["the plane", "the ship"]
    write(tmp_path / "labels" / "classes.txt", "a\nb\n\n")
    _, rows, findings = read_rows(tmp_path)
    assert ([r["expression"] for r in rows] == ["the a", "the b"]
            and [f.message for f in findings] == ["no class '2'"])
    (tmp_path.parent / "classes.txt").unlink()


def test_one_bad_byte_costs_one_line(tmp_path):
    (tmp_path / "rsvg_hr_train.txt").write_bytes(b"a.jpg,1,2,30,40,the pool\nb.jpg,1,2,30,40,the caf\xe9\n")
    _, rows, findings = read_rows(tmp_path / "rsvg_hr_train.txt")
    assert len(rows) == 1 and [(f.kind, f.line) for f in findings] == [("not UTF-8", 2)]


def test_a_stem_in_two_voc_lists_and_in_none(tmp_path):
    make_voc(tmp_path)
    annotation(tmp_path, "b c", [OBJECT.format("plane", 1, 2, 30, 20, "")])
    annotation(tmp_path, "d", [OBJECT.format("tank", 1, 2, 30, 20, "")])
    write(tmp_path / "ImageSets" / "Main" / "train.txt", "a\nb c\n")
    write(tmp_path / "ImageSets" / "Main" / "test.txt", "a  1\n")
    _, rows, findings = read_rows(tmp_path)
    assert sorted((r["split"], r["image_id"]) for r in rows) == [("test", "a.jpg"), ("train", "a.jpg"),
                                                                 ("train", "b c.jpg")]
    assert [(f.kind, f.rows) for f in findings if f.kind == "unlisted"] == [("unlisted", 1)]


def test_one_object_without_description_does_not_make_a_folder_voc(tmp_path):
    make_dior(tmp_path)
    annotation(tmp_path, "00001", [OBJECT.format("ship", 1, 2, 30, 20, "")])
    assert guess_format(tmp_path) == "dior_rsvg"


def test_files_made_to_take_forever_are_read_to_the_end(tmp_path):
    write(tmp_path / "a.json",
          [dict(image="a.png", conversations=[dict(value="[refer] " + "<p>" * 200_000), dict(value="")])])
    assert kinds(tmp_path / "a.json") == ["no expression"]
    shared_list = [dict(sent_id=k, sent="x") for k in range(1000)]
    make_refer(tmp_path / "refer")
    (tmp_path / "refer" / "rrsisd" / "refs(unc).p").write_bytes(
        pickle.dumps([dict(ann_id=9, split="train", sentences=shared_list)] * 1000))
    assert kinds(tmp_path / "refer") == ["unreadable"]
    annotation(tmp_path / "big", "a",
               [OBJECT.format("ship", 1, 2, 30, 20, "<description>The ship</description>")] * 20_000)
    assert len(read_rows(tmp_path / "big" / "Annotations" / "a.xml")[1]) == 20_000


@pytest.mark.parametrize("segmentation, size", [([[0, 0, 1, 1.7e8, 0, 0]], (1, 170_000_000)),
                                                ([[0, 0, 63, 47] * 20_000], (64, 48))])
def test_a_polygon_cannot_fill_the_memory(tmp_path, segmentation, size):
    whole = coco_file([dict(id=1, image_id=1, category_id=1, bbox=[0, 0, 1, 1], segmentation=segmentation)])
    whole["images"][0].update(width=size[0], height=size[1])
    write(tmp_path / "a.json", whole)
    assert kinds(tmp_path / "a.json")[0] in ("size", "bad mask")


def test_an_image_is_only_opened_by_pillow_itself(tmp_path):
    import os

    (tmp_path / "images").mkdir()
    (tmp_path / "images" / "a.jpg").write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n")
    os.mkfifo(tmp_path / "images" / "b.jpg")
    write(tmp_path / "rsvg_hr_train.txt", "a.jpg,1,2,30,40,the pool\nb.jpg,1,2,30,40,the pool\n")
    assert [f.message for f in read_rows(tmp_path)[2]] == ["a.jpg cannot be read as an image",
                                                           "b.jpg is not a plain file"]


def test_the_first_ending_in_sorted_order_wins_and_objects_in_no_split_are_counted(tmp_path):
    for name in ("12.tif", "12.png"): picture(tmp_path / "images" / name)
    mask_picture(tmp_path / "masks" / "12.tif", (5, 6, 30, 25))
    write(tmp_path / "output_phrase_train.txt", "12 the road\n")
    assert [r["image_id"] for r in read_rows(tmp_path)[1]] == ["12.png"]
    make_dior(tmp_path / "dior")
    write(tmp_path / "dior" / "test.txt", "")
    assert [(f.kind, f.rows, f.kept) for f in read_rows(tmp_path / "dior")[2]] == [("unlisted", 1, False)]


BOX, OTHER = [10, 20, 30, 25], [40, 20, 60, 25]
ASK, ANSWER = "<image>\nLocate the red pad", json.dumps(BOX)


def said(answer, question=ASK):
    return [{"from": "human", "value": question}, {"from": "gpt", "value": answer}]


def messages(answer, question=ASK):
    return [dict(role="user", content=question), dict(role="assistant", content=answer)]


SHAPES = {
    "tags": dict(image="a.jpg",
                 conversations=said("<think>at [1, 2, 3, 4]?</think><answer>[10, 20, 30, 25]</answer>")),
    "fenced": dict(image="a.jpg",
                   conversations=said('```json\n[{"bbox_2d": [10, 20, 30, 25], "label": "pad"}]\n```')),
    "marks": dict(image="a.jpg", conversations=said("<|object_ref_start|>the red pad<|object_ref_end|>"
                                                    "<|box_start|>(10,20),(30,25)<|box_end|>")),
    "internvl": dict(image="a.jpg", width=64, height=48,
                     conversations=said("<box>[[10, 20, 30, 25]]</box>", "Where is <ref>the red pad</ref>?")),
    "roles in conversations": dict(image=["a.jpg"], conversations=messages(ANSWER)),
    "system turn": dict(images=["a.jpg"],
                        messages=[dict(role="system", content="You are helpful."), *messages(ANSWER)]),
    "parts": dict(messages=[dict(role="user", content=[dict(type="image", image="a.jpg"),
                                                       dict(type="text", text="the red pad")]),
                            dict(role="assistant", content=[dict(type="text", text=ANSWER)])]),
    "image as an object": dict(images=[dict(path="a.jpg", bytes=None)], messages=messages(ANSWER)),
    "ms-swift": dict(images=["a.jpg"], messages=messages("<bbox>", "<image>find <ref-object>"),
                     objects=dict(ref=["the red pad"], bbox=[BOX])),
    "ms-swift, shares": dict(images=["a.jpg"], messages=messages("<bbox>", "<image>find <ref-object>"),
                             objects=dict(ref=["the red pad"], bbox=[[10 / 64, 20 / 48, 30 / 64, 25 / 48]],
                                          bbox_type="norm1")),
    "solution as text": dict(image="a.jpg", problem="the red pad",
                             solution="<answer>[10, 20, 30, 25]</answer>"),
    "solution as a list of one": dict(image="a.jpg", problem="the red pad", solution=[BOX]),
    "answer as an object": dict(images=["a.jpg"], problem="the red pad", answer=dict(bbox=BOX)),
    "answer as a list": dict(images="a.jpg", problem="the red pad", answer=BOX),
    "answer as objects": dict(images=["a.jpg"], problem="the red pad",
                              answer=[dict(bbox_2d=BOX, label="pad")]),
    "answer with corners": dict(images=["a.jpg"], problem="the red pad",
                                answer=dict(x1=10, y1=20, x2=30, y2=25)),
    "answer in figures": dict(images=["a.jpg"], problem="the red pad", answer=["10", "20", "30", "25"]),
    "alpaca": dict(images=["a.jpg"], instruction="Locate", input="the red pad", output=ANSWER),
    "query and response": dict(images=["a.jpg"], query=ASK, response=ANSWER),
    "prompt and completion": dict(image="a.jpg", prompt=[dict(role="user", content=ASK)],
                                  completion=[dict(role="assistant", content=ANSWER)]),
    "image_path": dict(image_path="a.jpg", question="the red pad", answer=ANSWER),
    "another box outside the answer":
    dict(image="a.jpg", conversations=said("Not [1, 2, 3, 4]: <answer>[10, 20, 30, 25]</answer>")),
    "the same box twice": dict(image="a.jpg",
                               conversations=said("[10, 20, 30, 25], that is (10, 20), (30, 25)")),}
REFUSED = {
    "two in a list": (dict(image="a.jpg", problem="x", solution=[BOX, OTHER]), "more than one box"),
    "two in an object": (dict(image="a.jpg", problem="x", answer=dict(bbox=[BOX, OTHER])),
                         "more than one box"),
    "two in a text": (dict(images=["a.jpg"], messages=messages(f"{BOX} and {OTHER}")), "more than one box"),
    "two in ms-swift": (dict(images=["a.jpg"], messages=messages("<bbox><bbox>"),
                             objects=dict(ref=[], bbox=[BOX, OTHER])), "more than one box"),
    "two in braces": (dict(image="a.jpg", conversations=said("{<1><2><3><4>}{<5><6><7><8>}")),
                      "more than one box"),
    "two images": (dict(images=["a.jpg", "b.jpg"], messages=messages(ANSWER)), "2 images"),
    "no image": (dict(images=[], messages=messages(ANSWER)), "no images"),
    "a question alone": (dict(image="a.jpg", conversations=said(ANSWER)[:1]), "question, answer"),
    "unknown names": (dict(image="a.jpg", problem="x", coords=BOX), "nearest: image + problem + solution"),
    "five numbers": (dict(image="a.jpg", problem="x", solution=[*BOX, 0.9]), "5 coordinates"),
    "nested too deeply": (dict(image="a.jpg", problem="x", solution=[[[[[[[[BOX]]]]]]]]), "no box"),}


def fine_tuning_file(path, row, form):
    picture(path / "a.jpg")
    text = {"list": json.dumps([row]), "lines": json.dumps(row) + "\n",
            "pretty": json.dumps([row], indent=2)}[form[0]]
    (path / f"train.{form[1]}").write_bytes(b"\xef\xbb\xbf" + text.encode())
    return read_rows(path)


FORMS = [("list", "json"), ("lines", "jsonl"), ("lines", "json"), ("pretty", "json"), ("list", "jsonl")]


@pytest.mark.parametrize("name", SHAPES)
def test_a_fine_tuning_row_is_read_in_every_shape_and_form(tmp_path, name):
    for form in FORMS:
        format, rows, findings = fine_tuning_file(tmp_path / form[0] / form[1], SHAPES[name], form)
        assert (format == "jsonl" and findings == [] and [r["box"] for r in rows] == [pytest.approx(BOX)]
                and rows[0]["image_id"] == "a.jpg")
        assert "the red pad" in rows[0]["expression"] or name == "marks" and "<" not in rows[0]["expression"]


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_no_row_is_said_with_its_reason(tmp_path, name):
    row, message = REFUSED[name]
    for form in FORMS[:2]:
        _, rows, findings = fine_tuning_file(tmp_path / form[0], row, form)
        assert rows == [] and [message in str(f) for f in findings] == [True], findings


def test_every_question_of_a_conversation_is_a_row(tmp_path):
    turns = said(ANSWER) + said(str(OTHER), "and the green one?") + said("none", "and the blue one?")
    _, rows, findings = fine_tuning_file(tmp_path, dict(image="a.jpg", conversations=turns), FORMS[1])
    assert [(r["expression_id"], r["box"]) for r in rows] == [("train:1", BOX), ("train:1:1", OTHER)]
    assert [str(f) for f in findings] == [
        "train.jsonl, line 1, question 2: no [x1, y1, x2, y2] in the answer"]


COCO_PLACES = ["annotations/instances.json", "annotations/instances_default.json",
               "annotations/instances_train2017.json", "annotations/train.json",
               "annotations/train_coco.json",
               "result.json", "instances.json", "train.json", "annotations.json", "_annotations.coco.json"]


@pytest.mark.parametrize("place", COCO_PLACES)
@pytest.mark.parametrize("image", ["images/a.jpg", "images/train/a.jpg", "images/default/a.jpg",
                                   "train2017/a.jpg", "a.jpg"])
def test_coco_is_found_wherever_exports_put_it(tmp_path, place, image):
    picture(tmp_path / image)
    write(tmp_path / place, coco_file([dict(id=1, image_id=1, category_id=1, bbox=[5, 6, 25, 19])]))
    format, rows, findings = read_rows(tmp_path, probe=True)
    assert ((format, findings) == ("coco", [])
            and [(r["box"], r["split"], r["category"]) for r in rows] == [([5, 6, 30, 25], "train", "ship")])


def test_label_studio_names_its_images_from_the_root(tmp_path):
    for name in ("images/a.jpg", "images\\a.jpg", "./images/a.jpg"):
        picture(tmp_path / "images" / "a.jpg")
        whole = coco_file([dict(id=1, image_id=1, category_id=1, bbox=[5, 6, 25, 19])])
        whole["images"][0]["file_name"] = name
        write(tmp_path / "result.json", whole)
        assert len(read_rows(tmp_path)[1]) == 1


@pytest.mark.parametrize("segmentation",
                         [[[5, 6, 30, 25]], [[5, 6, 30, 6, 30]], "text", 5, [["x"] * 6], [[]], [None],
                          [[[5, 6], [30, 6], [30, 25]]], dict(size=[48, 64], counts=[5, 5]),
                          dict(size=[64, 48], counts=[3072]), [[1, 2, 1e9, 4, 5, 6]]])
def test_a_broken_segmentation_costs_the_mask_alone_and_a_good_polygon_beside_it_stays(tmp_path,
                                                                                       segmentation):
    good = [5, 6, 30, 6, 30, 25, 5, 25]
    several = segmentation if isinstance(segmentation, list) else []
    for found, mask in [(segmentation, None)] + [([good, *several], (5, 6, 30, 25))] * bool(several):
        write(tmp_path / "a.json",
              coco_file([dict(id=1, image_id=1, category_id=1, bbox=[5, 6, 25, 19], segmentation=found)]))
        _, rows, findings = read_rows(tmp_path / "a.json")
        assert ([r["box"] for r in rows] == [[5, 6, 30, 25]]
                and (rows[0]["mask"] and mask_box(rows[0]["mask"])) == mask)
        assert [(f.kind, f.kept) for f in findings] == [("bad mask", True)]


@pytest.mark.parametrize("number", [float, str])
def test_ids_of_coco_may_be_floats_or_texts_and_the_size_may_be_missing(tmp_path, number):
    picture(tmp_path / "images" / "a.jpg")
    whole = dict(images=[dict(id=number(1), file_name="a.jpg", width=None)],
                 categories=[dict(id=1, name="ship")],
                 annotations=[dict(id=number(7), image_id=1, category_id=number(1), bbox=[5, 6, 25, 19])])
    write(tmp_path / "instances.json", whole)
    if number is str: whole["categories"][0]["id"] = "1"
    _, rows, findings = read_rows(tmp_path)
    assert findings == [] and [(r["category"], r["width"]) for r in rows] == [("ship", 64)]


def test_ids_of_an_export_name_their_split(tmp_path):
    for split in ("train", "valid"):
        picture(tmp_path / split / f"{split}.jpg")
        whole = coco_file([dict(id=1, image_id=1, category_id=1, bbox=[5, 6, 25, 19])])
        whole["images"][0]["file_name"] = f"{split}.jpg"
        write(tmp_path / split / "_annotations.coco.json", whole)
    assert [(r["expression_id"], r["split"]) for r in read_rows(tmp_path)[1]] == [("train:1", "train"),
                                                                                  ("valid:1", "val")]
    assert read_rows(tmp_path / "valid" / "_annotations.coco.json")[1][0]["expression_id"] == "valid:1"


@pytest.mark.parametrize("line, polygon, mask",
                         [("0 .25 .25 .5 .25 .5 .5 .25 .5", [16, 12, 32, 12, 32, 24, 16, 24], None),
                          ("0 .25 .25 .5 .25 .5 .5", None, (17, 12, 32, 24)),
                          ("0.0 .25 .25 .4 .25 .5 .4 .5 .5 .25 .5", None, (16, 12, 32, 24)),
                          ("0.0\t.375\t.375\t.25\t.25", None, None)])
def test_yolo_lines_hold_boxes_corners_or_polygons(tmp_path, line, polygon, mask):
    for labels, images in (("labels/train", "images/train"), ("train/labels", "train/images"),
                           ("labels", "images")):
        root = tmp_path / labels.replace("/", "_")
        picture(root / images / "a.png")
        write(root / labels / "a.txt", line)
        write(root / "data.yaml", "names: [pad]\n")
        format, rows, findings = read_rows(root)
        assert ((format, findings) == ("yolo", [])
                and [(r["box"], r.get("polygon")) for r in rows] == [([16, 12, 32, 24], polygon)])
        assert (mask_box(rows[0]["mask"]) if mask else rows[0].get("mask")) == mask
        assert guess_format(root / labels / "a.txt") == "yolo"


def test_a_label_with_a_confidence_is_refused_with_the_reason(tmp_path):
    picture(tmp_path / "images" / "a.png")
    write(tmp_path / "labels" / "a.txt", "0 .5 .5 .2 .2 .93")
    assert "5 numbers after the class: need 4 (box), 8 (four corners)" in str(read_rows(tmp_path)[2][0])


@pytest.mark.parametrize("folder",
                         ["labelTxt", "train/labelTxt", "labelTxt-v1.5", "labelTxt/train", "train/annfiles"])
def test_dota_keeps_corners_category_and_what_is_difficult(tmp_path, folder):
    images = ("train/images" if folder.startswith("train") else "images/train" if folder.endswith("train")
              else "images")
    picture(tmp_path / images / "P1.png")
    lines = ["imagesource:GoogleEarth", "gsd:null", "5.0 6.0 30 6 30 25 5 25 ship 0",
             "1 30 9 30 9 40 1 40 pad 1", "1 2 3 4 5 6 7 8", "50 30 90 30 90 40 50 40 swimming-pool 0"]
    (tmp_path / folder).mkdir(parents=True)
    (tmp_path / folder / "P1.txt").write_bytes("\r\n".join(lines).encode())
    format, rows, findings = read_rows(tmp_path)
    assert format == "dota" and [(r["category"], r["box"], r["doubtful"]) for r in rows] == [("ship", [
        5, 6, 30, 25], None), ("pad", [1, 30, 9, 40], "difficult"), ("swimming-pool", [50, 30, 90, 40], None)]
    assert (rows[0]["polygon"] == [5, 6, 30, 6, 30, 25, 5, 25]
            and [(f.kind, f.line) for f in findings] == [("wrong fields", 5), ("over the edge", 6)])


@pytest.mark.parametrize("encoding, name", [("GB2312", "停机坪"), ("GBK", "停机坪"),
                                            ("gb18030", "停机坪"), ("Big5", "停機坪"), ("Shift_JIS", "車"),
                                            ("EUC-KR", "차"), ("windows-1252", "café"), ("utf-16", "停机坪")])
def test_xml_is_read_in_the_encoding_that_it_declares(tmp_path, encoding, name):
    annotation(tmp_path, "a", [OBJECT.format(name, 1, 2, 30, 20, "")])
    path = tmp_path / "Annotations" / "a.xml"
    path.write_bytes((f'<?xml version="1.0" encoding="{encoding}"?>' + path.read_text()).encode(encoding))
    format, rows, findings = read_rows(tmp_path)
    assert (format, findings) == ("voc", []) and [r["category"] for r in rows] == [name]


@pytest.mark.parametrize("head",
                         ['<?xml version="1.0" encoding="zlib"?>', '<?xml version="1.0" encoding="nowhere"?>',
                          '<?xml version="1.0" encoding="GBK"?><!DOCTYPE a [<!ENTITY x "y">]>'])
def test_an_encoding_opens_no_door(tmp_path, head):
    annotation(tmp_path, "a", [OBJECT.format("ship", 1, 2, 30, 20, "")])
    path = tmp_path / "Annotations" / "a.xml"
    path.write_text(head + path.read_text())
    assert kinds(path) == ["unreadable"]


@pytest.mark.parametrize("encoding", ["utf-16", "utf-16-le", "utf-16-be", "utf-32"])
def test_utf_16_is_named(tmp_path, encoding):
    row = dict(image="a.jpg", expression="the ship", box=[1, 2, 30, 20])
    for k, (name, text) in enumerate({"train.jsonl": json.dumps(row), "train.json": json.dumps([row]),
                                      "annotations/instances.json": json.dumps(coco_file([])),
                                      "labels/a.txt": "0 .5 .5 .2 .2"}.items()):
        picture(tmp_path / str(k) / "images" / "a.jpg")
        write(tmp_path / str(k) / name, "")
        (tmp_path / str(k) / name).write_bytes(text.encode(encoding))
        assert ["UTF-16" in f.message for f in read_rows(tmp_path / str(k))[2]] == [True]


def spread_boxes(count, width, height):
    """Boxes all over a picture, as shares of its sides."""
    start = np.random.default_rng(0).uniform(0, 0.8, (count, 2))
    return np.hstack([start, start + 0.15])


@pytest.mark.parametrize("size", [(100, 60), (640, 360), (800, 800), (1600, 1200), (4000, 3000)])
@pytest.mark.parametrize("frame, scale",
                         [("pixels", 0), ("shares", 1), ("percent", 100), ("thousandths", 1000), ("xywh", 0)])
def test_boxes_in_another_frame_are_said_and_read_with_the_flag(tmp_path, size, frame, scale):
    shares = spread_boxes(30, *size)
    pixels = shares * np.tile(size, 2)
    written = shares * scale if scale else pixels
    if frame == "xywh": written = np.hstack([pixels[:, :2], pixels[:, 2:] - pixels[:, :2]])
    rows = [dict(image="a.jpg", width=size[0], height=size[1], expression=f"thing {k}", box=list(b))
            for k, b in enumerate(written.tolist())]
    write(tmp_path / "train.jsonl", "\n".join(map(json.dumps, rows)))
    flags = [f.message.split("--frame ")[1] for f in read_rows(tmp_path / "train.jsonl")[2]
             if f.kind == "other frame"]
    assert flags == ([] if frame == "pixels" else [frame])
    if flags:
        _, found, findings = read_rows(tmp_path / "train.jsonl", frame=frame)
        assert findings == [] and np.allclose([r["box"] for r in found], pixels)
    if flags and size == (100, 60):
        picture(tmp_path / "a.jpg", size)
        with pytest.warns(UserWarning, match=f"--frame {frame}"): load_folder(tmp_path)


def test_coco_boxes_written_as_corners_are_said(tmp_path):
    boxes = spread_boxes(20, 64, 48) * (64, 48, 64, 48)
    write(tmp_path / "a.json", coco_file([dict(id=k, image_id=1, category_id=1, caption=f"thing {k}", bbox=b)
                                          for k, b in enumerate(boxes.tolist())]))
    assert [f.message.split("--frame ")[1] for f in read_rows(tmp_path / "a.json")[2]
            if f.kind == "other frame"] == ["corners"]
    _, rows, findings = read_rows(tmp_path / "a.json", frame="corners")
    assert findings == [] and np.allclose([r["box"] for r in rows], boxes)
    make_yolo(tmp_path / "yolo")
    with pytest.raises(ValueError, match="has a frame of its own"):
        read_rows(tmp_path / "yolo", frame="shares")
    with pytest.raises(ValueError, match="unknown frame 'inches': use one of shares"):
        read_rows(tmp_path / "a.json", frame="inches")


def test_what_is_no_dataset_is_named(tmp_path):
    (tmp_path / "a.zip").write_bytes(b"PK")
    picture(tmp_path / "pictures" / "a.jpg")
    write(tmp_path / "pictures" / "note.txt", "hello")
    write(tmp_path / "named" / "my_rows.jsonl",
          json.dumps(dict(image="a.jpg", expression="the ship", box=[1, 2, 30, 20])))
    (tmp_path / "packed").mkdir()
    (tmp_path / "packed" / "b.tar.gz").write_bytes(b"\x1f\x8b")
    for name, message in (
            ("a.zip", "is an archive: unpack it"), ("pictures", "holds 1 pictures and no annotations"),
            ("pictures/a.jpg", "is a picture"), ("named", "the file 'my_rows.jsonl' in it looks like jsonl"),
            ("packed", "holds the archive 'b.tar.gz'"), ("x" * 5000, "is not a folder or file")):
        with pytest.raises(ValueError, match=message): read_rows(tmp_path / name)
    with pytest.raises(ValueError, match="is not a folder of images"):
        read_rows(tmp_path / "named" / "my_rows.jsonl", images=tmp_path / "nowhere")


def test_detections_keep_crowds_and_objects_of_one_name(tmp_path):
    write(tmp_path / "a.json",
          coco_file([dict(id=k, image_id=1, category_id=1, bbox=[5 * k, 6, 4, 19], iscrowd=int(k == 2))
                     for k in range(3)]))
    _, rows, findings = read_rows(tmp_path / "a.json", detections=True)
    assert ([(r["alike"], r["doubtful"]) for r in rows] == [(3, None), (3, None), (3, "crowd")]
            and findings == [])
    assert sorted((f.kind, f.rows) for f in read_rows(tmp_path / "a.json")[2]) == [("ambiguous", 2),
                                                                                   ("crowd", 1)]


@pytest.mark.parametrize("name, text",
                         [("a.txt", "0" + " -1" * 30_000 + " x"), ("a.txt", "1 " * 50_000),
                          ("a.json", "{}" + "\n" * 1_000_000), ("a.json", "{" + " " * 1_000_000)])
def test_the_format_of_a_file_made_to_take_forever_is_guessed(tmp_path, name, text):
    (tmp_path / name).write_text(text)
    assert guess_format(tmp_path / name) in (None, "phrases", "yolo")


@pytest.mark.parametrize("piece", ["[1, 2, ", "<think>", '{"bbox": [', "(1,2),", "</think>"])
def test_an_answer_made_to_take_forever_is_read_to_the_end(tmp_path, piece):
    assert len(fine_tuning_file(tmp_path, dict(image="a.jpg", problem="x", solution=piece * 100_000),
                                FORMS[1])[2]) == 1
