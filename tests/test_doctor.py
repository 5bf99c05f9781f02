import csv
import resource
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

from conftest import SHARED
from rsground_nb.folders import FEATURES, write_jsonl
from rsground_nb.doctor import check_image, doctor, examine
from rsground_nb.files import read_rows
from rsground_nb.run import main

BAD = SHARED / "data" / "bad_inputs"
CASES = list(csv.DictReader((BAD / "MANIFEST.tsv").open(encoding="utf-8"), delimiter="\t",
                            quoting=csv.QUOTE_NONE)) if BAD.is_dir() else []

# file -> (the sense of the manifest's message, good rows left). "accept": no finding but the image that the
# control folder shows in two splits.
EXPECTED = {
    "dior_xml/truncated.xml": ("XML is cut off", 0), "dior_xml/empty_file.xml": ("empty annotation file", 0),
    "dior_xml/billion_laughs.xml": ("entity declarations are not allowed", 0),
    "dior_xml/external_entity.xml": ("entity declarations are not allowed", 0),
    "dior_xml/missing_bndbox.xml": ("object 0: no bndbox", 1),
    "dior_xml/inverted_box.xml": ("box is inverted: 30, 25, 5, 6", 1),
    "dior_xml/zero_area_box.xml": ("box has no area", 1),
    "dior_xml/box_outside.xml": ("box lies outside the image 64x48", 1),
    "dior_xml/nan_coord.xml": ("xmin is not a finite number", 1),
    "dior_xml/text_coord.xml": ("object 0: xmin is not a number: 'five'", 1),
    "dior_xml/huge_float.xml": ("xmax is not a finite number", 1),
    "dior_xml/huge_int.xml": ("xmax is not a finite number", 1),
    "dior_xml/duplicate_objects.xml": ("object 1 repeats object 0", 3),
    "dior_xml/empty_description.xml": ("object 0: no expression", 1),
    "dior_xml/not_utf8.xml": ("not UTF-8 (byte 411)", 0),
    "dior_xml/bom.xml": (None, 2), "dior_xml/missing_image.xml": ("image 09999.jpg not found", 0),
    "dior_xml/wrong_declared_size.xml": ("declared 800x800, image is 64x48", 0),
    "dior_xml/absolute_path.xml": ("file name must be a plain name", 0),
    "dior_xml/dotdot_path.xml": ("file name leaves the image folder", 0),
    "images/truncated.jpg": ("is cut off", 0), "images/png_named.jpg": ("is PNG, named .jpg", 2),
    "images/one_by_one.jpg": ("image too small: 1x1", 0),
    "images/bomb_60000x60000.png": ("over the pixel limit", 0),
    "images/link_outside.jpg": ("link leaves the image folder", 0),
    "index/out_of_range.txt": ("line 2: index 2 of 2 objects", 1),
    "index/duplicate.txt": ("line 3: index 1 repeated", 2),
    "index/negative.txt": ("line 2: negative index -1", 1),
    "index/non_integer.txt": ("line 2: not an integer: '00001.xml' (an index counts <object> "
                              "elements, not files)", 1), "index/crlf.txt": (None, 2),
    "vrsbench/missing_key.json": ("row 0 (question_id 0): no ground_truth", 1),
    "vrsbench/three_coordinates.json": ("row 0 (question_id 0): 3 coordinates, need 4", 1),
    "vrsbench/over_100.json": ("460 is over 100", 1), "refgeo/broken_middle.jsonl": ("line 2: not JSON", 2),
    "refgeo/deep_nesting.jsonl": ("line 2: nested too deeply", 1),
    "rrsisd/rle_wrong_sum.json": ("annotation 1: mask left out: RLE covers 3000 of 3072 pixels", 1),
    "rrsisd/rle_swapped_size.json": ("annotation 1: mask left out: mask 64x48 (h x w), image 48x64", 1),
    "rrsisd/refs(unc).p": ("pickle asks for builtins.open; only plain containers are allowed", 0),
    "rsvg_hr/short_line.txt": ("line 2: 4 fields, need 6 or more", 1),
    "yolo/wrong_numbers.txt": ("line 2: 320 is outside 0-1", 1),}


def case_path(shared, tmp_path, name):
    """What the doctor is shown: the file alone, or for XML, index files and images a copy of the
    control folder that holds it."""
    kind, file = name.split("/")
    source = shared / "bad_inputs" / name
    if kind not in ("dior_xml", "index", "images"): return shutil.copy(source, tmp_path / file)
    root = Path(shutil.copytree(shared / "bad_inputs" / "control", tmp_path / "mini"))
    for split in ("val", "test"): (root / f"{split}.txt").unlink()
    (root / "train.txt").write_text("0\n1\n" if kind != "dior_xml"
                                    or "duplicate" not in file else "0\n1\n2\n")
    if kind == "dior_xml": (root / "Annotations" / "00001.xml").write_bytes(source.read_bytes())
    elif kind == "index": (root / "train.txt").write_bytes(source.read_bytes())
    else:
        (root / "JPEGImages" / "00001.jpg").unlink()
        if "link" in file:
            (root / "JPEGImages" / "00001.jpg").symlink_to(shared / "aerial_mini" / "JPEGImages"
                                                           / "00001.jpg")
        else: (root / "JPEGImages" / "00001.jpg").write_bytes(source.read_bytes())
    return root


def test_the_manifest_and_this_test_name_the_same_files(shared):
    assert {c["file"] for c in CASES} == set(EXPECTED)


@pytest.mark.parametrize("name", EXPECTED)
def test_every_bad_input_is_found_and_good_rows_are_kept(shared, tmp_path, name, capsys):
    marker = Path("/tmp") / "PWNED_BY_PICKLE"
    assert not marker.exists()
    path = case_path(shared, tmp_path, name)
    before = {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()}
    message, good = EXPECTED[name]
    report = examine(path)
    said = [str(f) for f in report.findings]
    assert len(report.rows) == good
    if message is None: assert said == []
    else: assert any(message in line for line in said), said
    assert doctor(path) == (0 if message is None else 1)
    assert "CANARY" not in capsys.readouterr().out and not marker.exists()
    assert before == {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()}


def test_a_billion_laughs_costs_no_memory(shared):
    def limit(): resource.setrlimit(resource.RLIMIT_AS, (3 * 2 ** 30, 3 * 2 ** 30))
    program = ("from rsground_nb.reading import open_xml; from pathlib import Path\ntry: "
               f"open_xml(Path({str(shared / 'bad_inputs' / 'dior_xml' / 'billion_laughs.xml')!r}))\nexcept "
               "ValueError as e: print(e)")
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, preexec_fn=limit,
                          timeout=60)
    assert done.stdout.strip() == "entity declarations are not allowed", done.stderr


def test_the_known_defects_of_rsvg_hr_are_named_with_their_lines(shared):
    said = {(f.file, f.line): f for f in examine(shared / "rsvg_hr").findings if f.line}
    train = {18: "decimal comma", 450: "inverted box",
             **dict.fromkeys((315, 572, 1305, 1988), "over the edge"),
             **dict.fromkeys((6, 115, 197, 417, 556, 1431, 1597, 1744, 1989, 1990), "spacing")}
    test = {172: "over the edge", 265: "spacing", **dict.fromkeys((146, 147, 148), "row in two splits"),
            434: "box in two splits"}
    expected = {("rsvg_hr_train.txt", k): v for k, v in train.items()} | {("rsvg_hr_test.txt",
                                                                           k): v for k, v in test.items()}
    assert {place: f.kind for place, f in said.items()} == expected
    assert said["rsvg_hr_test.txt", 148].message == "row repeats rsvg_hr_train.txt, line 778 (train and test)"


def test_real_crops_are_healthy(shared, capsys):
    assert main(["data", "doctor", str(shared / "aerial_mini"), "--quick"]) == 0
    assert "282 good rows, 0 lost, 85 images looked at; 0 findings" in capsys.readouterr().out


def test_the_manifest_holds_the_good_rows_and_nothing_is_overwritten(shared, tmp_path):
    report = examine(shared / "aerial_mini", decode=False)
    path = tmp_path / "good.jsonl"
    images = write_jsonl(report.rows, path, report.path)
    _, rows, findings = read_rows(path, images=images)
    assert len(rows) == 282 and images == shared / "aerial_mini" / "JPEGImages"
    assert findings == [] and [[r.get(k) for k in FEATURES] for r in rows] == [[r.get(k) for k in FEATURES]
                                                                               for r in report.rows]
    with pytest.raises(ValueError, match="exists already"): write_jsonl(report.rows, path, report.path)
    with pytest.raises(ValueError, match="inside the dataset"):
        write_jsonl(report.rows, shared / "aerial_mini" / "new.jsonl", report.path)
    assert main(["data", "doctor", f"{path}@{images}", "--quick"]) == 0
    assert main(["data", "doctor", str(shared / "aerial_mini"), "--quick", "--manifest", str(path)]) == 2


def test_a_linked_image_folder_survives_a_manifest(shared, tmp_path, capsys):
    root = tmp_path / "mini"
    shutil.copytree(shared / "bad_inputs" / "control", root)
    shutil.move(root / "JPEGImages", tmp_path / "elsewhere")
    (root / "JPEGImages").symlink_to(tmp_path / "elsewhere")
    assert main(["data", "doctor", str(root), "--manifest", str(tmp_path / "m.jsonl")]) == 1
    assert f"use them as {tmp_path}/m.jsonl@{root}/JPEGImages" in capsys.readouterr().out
    assert len(examine(f"{tmp_path}/m.jsonl@{root}/JPEGImages").rows) == 2


def test_what_is_no_dataset_is_not_taken_for_a_folder_of_images(tmp_path, capsys):
    (tmp_path / "a.csv").write_text("a,b\n")
    Image.new("RGB", (64, 64)).save(tmp_path / "a.png")
    assert main(["data", "doctor", str(tmp_path)]) == 2
    (tmp_path / "a.csv").unlink()
    assert main(["data", "doctor", str(tmp_path)]) == 0


def test_exit_codes(tmp_path, capsys):
    (tmp_path / "odd.txt").write_text("nothing that we know\x00")
    assert main(["data", "doctor", str(tmp_path / "nowhere")]) == 2
    (tmp_path / "empty").mkdir()
    assert main(["data", "doctor", str(tmp_path / "empty")]) == 2
    (tmp_path / "rsvg_hr_train.txt").write_text("a.jpg,1,2,30,40,the pool\n")
    assert main(["data", "doctor", str(tmp_path / "rsvg_hr_train.txt")]) == 0
    (tmp_path / "rsvg_hr_train.txt").write_text("a.jpg,1,2,1,40,the pool\n")
    assert main(["data", "doctor", str(tmp_path / "rsvg_hr_train.txt")]) == 1
    assert "rsvg_hr_train.txt, line 1: box has no area" in capsys.readouterr().out
    assert main(["data", "doctor", str(tmp_path / "rsvg_hr_train.txt"), "--format", "pascal"]) == 2


def test_a_written_split_can_be_used_like_a_folder(shared, tmp_path, capsys):
    from rsground_nb.data import describe, load_data
    from rsground_nb.run import whole_path
    from rsground_nb.scale import get_scale

    data, out = str(shared / "aerial_mini"), tmp_path / "new.jsonl"
    assert main(["data", "split", data, str(out), "--seed", "3"]) == 0
    said = capsys.readouterr().out
    images = f"{data}/JPEGImages"
    assert f"use it as {out}@{images}" in said
    splits, findings = load_data(f"{out}@{images}", get_scale("smoke"), 0)
    assert (findings == [] and sum(map(len, splits.values())) == 282
            and all(h in said for h in describe(splits)[0].hash))
    assert whole_path(f"{out}@{images}") == f"{out}@{images}" and splits["test"][0]["image"].size
    assert main(["data", "split", data, str(out)]) == 2 and "exists already" in capsys.readouterr().err
    assert main(["data", "split", data, str(tmp_path / "b.jsonl"), "--how", "luck"]) == 2


def test_a_jpeg_with_a_second_picture_is_a_jpeg(tmp_path):
    pictures = [Image.new("RGB", (64, 48), colour) for colour in ("grey", "white")]
    pictures[0].save(tmp_path / "a.jpg", format="MPO", save_all=True, append_images=pictures[1:])
    with Image.open(tmp_path / "a.jpg") as opened: assert opened.format == "MPO"
    assert check_image(tmp_path / "a.jpg") == []


def test_findings_of_one_kind_are_counted_and_ten_are_listed(tmp_path, capsys):
    lines = [f"a.jpg,1,2,1,40,the pool number {k}" for k in range(25)] + ["a.jpg,1,2,30,40,the court"]
    (tmp_path / "rsvg_hr_train.txt").write_text("\n".join(lines))
    assert main(["data", "doctor", str(tmp_path / "rsvg_hr_train.txt")]) == 1
    said = capsys.readouterr().out.splitlines()
    assert (said[1] == "      25  no area" and len(said) == 13
            and said[-1] == "... and 15 more: --all lists them")
    assert main(["data", "doctor", str(tmp_path / "rsvg_hr_train.txt"), "--all"]) == 1
    assert len(capsys.readouterr().out.splitlines()) == 27


def test_an_export_of_detections_says_how_many_rows_are_ambiguous(shared, capsys):
    assert main(["data", "doctor", str(shared / "aerial_planes"), "--quick"]) == 1
    said = capsys.readouterr().out.splitlines()
    assert ("152 good rows, 6996 lost" in said[0] and said[1] == "     786  ambiguous (6996 rows)"
            and len(said) == 13)


def test_boxes_in_another_frame_become_a_manifest_in_pixels(shared, tmp_path, capsys):
    data, out = str(shared / "field_cases" / "boxes_as_shares"), str(tmp_path / "m.jsonl")
    assert main(["data", "doctor", data]) == 1 and "read them with --frame shares" in capsys.readouterr().out
    assert main(["data", "doctor", data, "--frame", "shares", "--manifest", out]) == 0
    assert [r["box"] for r in examine(f"{out}@{data}").rows] == [pytest.approx([10, 19.8, 30, 39.6]),
                                                                 pytest.approx([0, 0, 100, 18])]
    assert main(["data", "split", data, str(tmp_path / "s.jsonl"), "--frame", "shares"]) == 0
    assert (main(["data", "doctor", data, "--frame", "inches"]) == 2
            and "unknown frame 'inches'" in capsys.readouterr().err)


def test_archives_and_folders_of_pictures_are_named_in_one_sentence(tmp_path, capsys):
    for folder in ("packed", "pictures"): (tmp_path / folder).mkdir()
    (tmp_path / "packed" / "a.zip").write_bytes(b"PK")
    (tmp_path / "p.jsonl").write_text('{"expression_id": "a", "predicted": [1, 2, 3, 4]}')
    Image.new("RGB", (64, 64)).save(tmp_path / "pictures" / "a.png")
    for command in (["data", "doctor", "{}"], ["data", "split", "{}", str(tmp_path / "new.jsonl")],
                    ["evaluate", str(tmp_path / "p.jsonl"), "--data", "{}"],
                    ["run", "--data", "{}", "--out", str(tmp_path / "run")]):
        assert main([word.replace("{}", str(tmp_path / "packed" / "a.zip")) for word in command]) == 2
        assert "is an archive: unpack it and name the folder" in capsys.readouterr().err
    assert (main(["data", "doctor", str(tmp_path / "pictures")]) == 0
            and "no annotations here" in capsys.readouterr().out)
    assert main(["data", "split", str(tmp_path / "pictures"), str(tmp_path / "new.jsonl")]) == 2
    assert "holds 1 pictures and no annotations" in capsys.readouterr().err
