import json
import os

import nbformat
import numpy as np
import papermill
import pytest
from hypothesis import given, settings, strategies as st
from PIL import Image

from conftest import ROOT
from rsground_nb.data import describe, load_data, resplit, split_hash
from rsground_nb.files import read_rows
from rsground_nb.folders import (
    FEATURES, compare_rows, data_parts, fingerprint, find_rows, load_folder, to_dataset, write_jsonl)
from rsground_nb.scale import get_scale
from rsground_nb.scenes import scene_records

HASHES = {"train": "4231ca82e1b0c053f30ca45652df643edfc4151283ff34716b9d836d04706487",
          "val": "cf228f3814159ab3deca93bb11765d4cdd761441c794039cf68bda0d7be7a44c",
          "test": "f7d46fe6bd3fbe9be577cb613e7ce5da1789a46a1a72c9c8cc16b81ea57c1e26"}


def test_the_splits_of_real_crops_are_those_of_their_makers(shared):
    splits, findings = load_folder(shared / "aerial_mini")
    assert {name: split_hash(rows) for name, rows in splits.items()} == HASHES
    assert findings == []
    for rows in splits.values():
        assert rows.features == FEATURES
        for row in rows: assert row["image"].size == (row["width"], row["height"])


def test_the_executed_chapter_shows_sizes_hashes_and_categories_of_real_crops(shared, tmp_path):
    papermill.execute_notebook(str(ROOT / "nbs" / "03_data.ipynb"), str(tmp_path / "out.ipynb"),
                               parameters=dict(data=str(shared / "aerial_mini"), out=str(tmp_path / "run")),
                               progress_bar=False, cwd=tmp_path)
    shown = "\n".join(str(o.get("text", "")) + str(o.get("data", {}).get("text/plain", ""))
                      for c in nbformat.read(tmp_path / "out.ipynb", 4).cells for o in c.get("outputs", []))
    for name, count in (("train", 168), ("val", 44), ("test", 70)):
        assert any(line.split() == [name, HASHES[name]] for line in shown.splitlines())
        assert any(line.split()[:2] == [name, str(count)] for line in shown.splitlines())
    for category, count in (("car", 230), ("tree", 38), ("minibus", 8), ("bus", 6)):
        line = next(line for line in shown.splitlines() if line.split()[:1] == [category])
        assert sum(map(int, line.split()[1:])) == count


def test_what_comes_from_the_cache_is_what_was_read(shared, tmp_path):
    first, again = (load_folder(shared / "rsvg_hr", cache=tmp_path) for _ in range(2))
    assert len(list(tmp_path.iterdir())) == 1
    assert ({k: split_hash(v) for k, v in first[0].items()} == {k: split_hash(v) for k, v in again[0].items()}
            and first[1] == again[1] and len(first[1]) == 24)
    assert {k: len(v) for k, v in again[0].items()} == {"train": 2149, "test": 499}


def test_the_cache_notices_a_changed_file(tmp_path):
    path = tmp_path / "data" / "train.jsonl"
    path.parent.mkdir()
    path.write_text('{"image": "a.jpg", "expression": "the ship", "box": [1, 2, 3, 4]}')
    before = fingerprint([path.parent]), fingerprint([path])
    os.utime(path, (1, 1))
    assert fingerprint([path.parent]) != before[0] and fingerprint([path]) != before[1]


def test_a_cache_that_cannot_be_written_is_said_and_nothing_else(tmp_path):
    (tmp_path / "file").write_text("no folder")
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "rsvg_hr_train.txt").write_text("a.jpg,1,2,30,40,the pool\n")
    with pytest.warns(UserWarning, match="cannot be written"):
        splits, _ = load_folder(tmp_path / "data", cache=tmp_path / "file" / "cache")
    assert len(splits["train"]) == 1


def test_a_folder_that_is_not_a_dataset_is_refused_in_one_sentence(shared, tmp_path):
    with pytest.raises(ValueError, match="is not a folder"):
        load_data("no/such/folder", get_scale("smoke"), 0)
    with pytest.raises(ValueError, match="none of the known layouts"):
        load_data(str(tmp_path), get_scale("smoke"), 0)
    with pytest.raises(ValueError, match="has no images"):
        load_data(str(shared / "rsvg_hr"), get_scale("smoke"), 0)


def rows_of(counts):
    """Image k holds counts[k] rows."""
    return {"train": to_dataset([dict(image_id=f"{k}.jpg", box=(j, 0, j + 1, 1), expression=f"thing {j}",
                                      split="train") for k, n in enumerate(counts) for j in range(n)])}


@settings(max_examples=15, deadline=None)
@given(st.lists(st.integers(1, 5), min_size=3, max_size=40), st.integers(0, 1000))
def test_a_disjoint_split_loses_no_row_and_shares_no_image(counts, seed):
    before, after = rows_of(counts), resplit(rows_of(counts), seed=seed)
    images = [set(rows["image_id"]) for rows in after.values()]
    assert all(not a & b for i, a in enumerate(images) for b in images[:i])
    assert sorted((r["image_id"], r["expression"]) for rows in after.values() for r in rows) == sorted(
        (r["image_id"], r["expression"]) for r in before["train"])
    assert all(set(rows["split"]) == {name} for name, rows in after.items())
    assert {k: split_hash(v) for k, v in after.items()} == {
        k: split_hash(v) for k, v in resplit(rows_of(counts), seed=seed).items()}


def test_a_split_has_the_asked_shares():
    after = resplit(rows_of([1] * 1000), "random", shares=(0.7, 0.1, 0.2))
    assert {k: len(v) for k, v in after.items()} == {"train": 700, "val": 100, "test": 200}


def test_rows_that_repeat_each_other_are_named(shared):
    _, rows, _ = read_rows(shared / "rsvg_hr")
    said = [str(f) for f in compare_rows(rows)]
    for line, other in ((146, 610), (147, 697), (148, 778)):
        assert (f"rsvg_hr_test.txt, line {line}: row repeats rsvg_hr_train.txt, line "
                f"{other} (train and test)" in said)
    assert ("rsvg_hr_test.txt, line 434: same image and box as rsvg_hr_train.txt, line 1638 (train and "
            "test), different text" in said)
    assert "test: 46 images are in train and test (47 rows of test)" in said and len(said) == 5


def test_scenes_are_the_same_for_the_same_seed():
    first, again, other = (load_data("scenes", get_scale("smoke"), seed)[0] for seed in (3, 3, 4))
    assert {k: split_hash(v) for k, v in first.items()} == {k: split_hash(v) for k, v in again.items()}
    assert first["train"][0]["image"].tobytes() == again["train"][0]["image"].tobytes()
    assert split_hash(first["train"]) != split_hash(other["train"])


def test_a_search_finds_rows_by_words_and_category(shared):
    splits, _ = load_folder(shared / "aerial_mini")
    found = find_rows(splits["train"], "left", "car")
    assert found and all("left" in splits["train"][k]["expression"].lower()
                         and splits["train"][k]["category"] == "car" for k in found)
    sizes, kinds = describe(splits)
    assert (sizes.N.tolist() == [168, 44, 70] and kinds.to_numpy().sum() == 282
            and np.all(np.diff(kinds.sum(axis=1)) <= 0))


def test_the_cache_notices_an_image_that_has_come(tmp_path):
    rows = [dict(image=f"{k}.png", expression=f"thing {k}", box=[1, 2, 3, 4]) for k in range(2)]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (tmp_path / "images").mkdir()
    for k in range(2):
        Image.new("RGB", (8, 8)).save(tmp_path / "images" / f"{k}.png")
        splits, _ = load_folder(tmp_path / "rows.jsonl", images=tmp_path / "images", cache=tmp_path / "cache")
        assert len(splits["train"]) == k + 1


def test_the_same_cache_serves_relative_paths_from_elsewhere(tmp_path, monkeypatch):
    (tmp_path / "a" / "b").mkdir(parents=True)
    Image.new("RGB", (8, 8)).save(tmp_path / "a" / "0.png")
    (tmp_path / "a" / "train.jsonl").write_text(json.dumps(dict(image="0.png", expression="thing",
                                                                box=[1, 2, 3, 4])))
    for here, path in (("a", "."), ("a/b", "..")):
        monkeypatch.chdir(tmp_path / here)
        assert load_folder(path, cache=tmp_path / "cache")[0]["train"][0]["image"].size == (8, 8)


def test_names_that_are_not_utf8_and_folders_that_cannot_be_listed_do_not_stop_the_cache(tmp_path):
    (tmp_path / "data" / "closed").mkdir(parents=True)
    (tmp_path / "data" / "closed").chmod(0)
    open(os.fsencode(str(tmp_path / "data")) + b"/caf\xe9.txt", "w").close()
    (tmp_path / "data" / "loop").symlink_to(tmp_path / "data" / "loop")
    assert len(fingerprint([tmp_path / "data"])) == 64
    (tmp_path / "data" / "closed").chmod(0o700)


def test_a_file_at_a_folder_may_have_signs_in_its_name(tmp_path):
    (tmp_path / "me@home").mkdir()
    (tmp_path / "m.jsonl").write_text("{}")
    assert data_parts(f"{tmp_path}/m.jsonl@{tmp_path}/me@home") == (f"{tmp_path}/m.jsonl",
                                                                    f"{tmp_path}/me@home")
    assert data_parts(tmp_path / "me@home") == (f"{tmp_path}/me@home", None)


def test_objects_are_known_for_scenes_and_not_for_real_crops(shared):
    scenes, crops = (load_data("scenes", get_scale("smoke"), 0)[0]["val"],
                     load_folder(shared / "aerial_mini")[0]["val"])
    assert scenes.features == crops.features == FEATURES and set(crops["objects"]) == {None}
    for row in scenes.remove_columns("image"):
        assert [o["category"] for o in row["objects"] if o["box"] == row["box"]] == [row["category"]]


def test_objects_survive_the_way_through_a_file_the_cache_and_a_new_split(tmp_path):
    (tmp_path / "images").mkdir()
    made = [{**r, "image": str(tmp_path / "images" / f"{r['image_id']}.png")}
            for r in scene_records(6, 0, style="aerial")]
    for r in made: Image.new("RGB", (112, 112)).save(r["image"])
    made[0]["objects"], made[1]["objects"], made[2]["objects"][0]["colour"] = None, [], None
    images = write_jsonl(made, tmp_path / "rows.jsonl", tmp_path / "images")
    for _ in range(2):
        splits, findings = load_folder(tmp_path / "rows.jsonl", images=images, cache=tmp_path / "cache")
        assert findings == [] and splits["train"]["objects"][:] == [r["objects"] for r in made]
    again = {r["expression_id"]: r["objects"] for part in resplit(splits).values()
             for r in part.remove_columns("image")}
    assert again == {r["expression_id"]: r["objects"] for r in made}
    assert split_hash(splits["train"]) == split_hash(to_dataset([{**r, "objects": None} for r in made]))
