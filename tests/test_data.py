import shutil

import pytest

from rsground_nb.data import load_data, load_dior_rsvg, open_xml, read_file, read_index, split_hash
from rsground_nb.scale import get_scale

HASHES = {"train": "4231ca82e1b0c053f30ca45652df643edfc4151283ff34716b9d836d04706487",
          "val": "cf228f3814159ab3deca93bb11765d4cdd761441c794039cf68bda0d7be7a44c",
          "test": "f7d46fe6bd3fbe9be577cb613e7ce5da1789a46a1a72c9c8cc16b81ea57c1e26"}


def test_the_splits_of_real_crops_are_those_of_their_makers(shared):
    splits, problems = load_dior_rsvg(shared / "aerial_mini")
    assert {name: split_hash(rows) for name, rows in splits.items()} == HASHES
    assert problems == []
    for rows in splits.values():
        for row in rows: assert row["image"].size == (row["width"], row["height"])


def folder_with(shared, tmp_path, case):
    """The valid control folder with its annotation replaced by a broken one."""
    root = tmp_path / "mini"
    shutil.copytree(shared / "bad_inputs" / "control", root)
    (root / "Annotations" / "00001.xml").write_bytes((shared / "bad_inputs" / "dior_xml" / case).read_bytes())
    return root


@pytest.mark.parametrize("case, message", [
    ("truncated.xml", "cut off"), ("empty_file.xml", "empty annotation file"), ("billion_laughs.xml", "entity declarations are not allowed"),
    ("external_entity.xml", "entity declarations are not allowed"), ("absolute_path.xml", "must be a plain name"), ("dotdot_path.xml", "must be a plain name"),
    ("missing_image.xml", "not found")])
def test_an_unreadable_annotation_file_is_refused_by_name(shared, tmp_path, case, message):
    with pytest.raises(ValueError, match=message) as error: load_dior_rsvg(folder_with(shared, tmp_path, case))
    assert "00001.xml" in str(error.value) and "CANARY" not in str(error.value)


@pytest.mark.parametrize("case, message", [
    ("missing_bndbox.xml", "no bndbox"), ("inverted_box.xml", "box is inverted"), ("zero_area_box.xml", "no area"), ("box_outside.xml", "leaves the image"),
    ("nan_coord.xml", "xmin is not a finite number"), ("text_coord.xml", "xmin is not a number: 'five'"), ("huge_float.xml", "xmax is not a finite number"),
    ("huge_int.xml", "xmax is not"), ("empty_description.xml", "no expression")])
def test_a_bad_object_is_listed_and_keeps_its_number(shared, tmp_path, case, message):
    root = folder_with(shared, tmp_path, case)
    records, problems = read_file(root / "Annotations" / "00001.xml", root / "JPEGImages")
    assert len(problems) == 1 and message in problems[0] and "object 0" in problems[0]
    assert records[0] is None and len(records) == len(open_xml(root / "Annotations" / "00001.xml").findall("object"))


def test_a_declared_size_that_is_not_the_images_is_listed(shared, tmp_path):
    root = folder_with(shared, tmp_path, "wrong_declared_size.xml")
    records, problems = read_file(root / "Annotations" / "00001.xml", root / "JPEGImages")
    assert records == [None] * len(problems) and problems and "declared 800x800, image is 64x48" in problems[0]


def test_a_folder_without_a_usable_row_is_refused_and_an_empty_split_is_listed(shared, tmp_path):
    root = tmp_path / "mini"
    shutil.copytree(shared / "bad_inputs" / "control", root)
    (root / "val.txt").write_text("")
    splits, problems = load_dior_rsvg(root)
    assert "val" not in splits and problems == ["val.txt: no usable row, the split is left out"]
    (root / "train.txt").write_text("\n")
    with pytest.raises(ValueError, match="no usable rows in train.txt"): load_data(str(root), get_scale("smoke"), 0)


def test_an_image_that_is_no_image_is_refused(shared, tmp_path):
    root = tmp_path / "mini"
    shutil.copytree(shared / "bad_inputs" / "control", root)
    (root / "JPEGImages" / "00001.jpg").write_bytes(b"not a picture")
    with pytest.raises(ValueError, match="image 00001.jpg cannot be read"): load_dior_rsvg(root)


def test_a_byte_order_mark_is_no_defect(shared, tmp_path):
    root = folder_with(shared, tmp_path, "bom.xml")
    records, problems = read_file(root / "Annotations" / "00001.xml", root / "JPEGImages")
    assert len(records) == 2 and not problems


@pytest.mark.parametrize("case, message", [("out_of_range", "index 2 of 2 objects .line 2"), ("duplicate", "index 1 repeated .line 3"), ("negative", "negative index -1 .line 2"),
                                           ("non_integer", "line 2 is not an integer: '00001.xml'")])
def test_a_bad_index_is_refused_with_its_line(shared, case, message):
    with pytest.raises(ValueError, match=message): read_index(shared / "bad_inputs" / "index" / f"{case}.txt", 2)


def test_windows_line_ends_are_no_defect(shared):
    assert read_index(shared / "bad_inputs" / "index" / "crlf.txt", 2) == [0, 1]


def test_scenes_are_the_same_for_the_same_seed():
    first, again, other = (load_data("scenes", get_scale("smoke"), seed)[0] for seed in (3, 3, 4))
    assert {k: split_hash(v) for k, v in first.items()} == {k: split_hash(v) for k, v in again.items()}
    assert first["train"][0]["image"].tobytes() == again["train"][0]["image"].tobytes()
    assert split_hash(first["train"]) != split_hash(other["train"])
