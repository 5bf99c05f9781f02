"""Segmenters and files: folders in three layouts run train -> predict -> evaluate, the scores agree with a
count of pixels, and what is wrong with a file, a folder or a setting is said in one sentence."""
import json
import pickle
import re

import numpy as np
import pandas as pd
import pytest
import torch
import yaml
from PIL import Image
from pycocotools import mask as coco_mask
from transformers import SamImageProcessorPil, SamModel

from rsground_nb.align import load_clip
from rsground_nb.data import load_folder
from rsground_nb.evaluate import write_predictions
from rsground_nb.launch import CONFIGS, plan_line
from rsground_nb.maskfiles import base_shapes, mask_lines, parse_segment, segment_memory, segmenter_to_ask
from rsground_nb.masks import load_sam, make_segmenter, tiny_sam_config
from rsground_nb.maskscores import MASK_MODES, evaluate_masks, mask_modes
from rsground_nb.reading import Defect
from rsground_nb.run import STAGES, gallery, main
from rsground_nb.scoring import load_predictions
from rsground_nb.segmentation import segment_rows, trained_in
from rsground_nb.shapes import decode_mask, encode_mask

SHORT = ("--align_steps 2 --sam_steps 2 --ground_steps 2 --pictures_per_step 2 "
         "--questions_per_picture 2").split()
TINY = ["train", "segment", "--config", "tiny_segment.yaml", "--scenes", "3", *SHORT]
SPLITS = ("train", "val", "test")


def pictures(split):
    """[(image, expression, true mask), ...] of one question about each of four drawn pictures."""
    rows = segment_rows(4, 5, per_scene=1, split=split)
    return [(r["image"], r["expression"], decode_mask(r["mask"])) for r in rows]


def make_refsegrs(root, first=0):
    """images/<id>.tif, masks/<id>.tif and lines `<id> <phrase>`; the ids of RefSegRS are numbers."""
    for folder in ("images", "masks"): (root / folder).mkdir(parents=True)
    for k, split in enumerate(SPLITS):
        lines = []
        for n, (image, text, mask) in enumerate(pictures(split), first + 10 * k):
            image.save(root / "images" / f"{n}.tif")
            Image.fromarray(mask.astype(np.uint8) * 255).save(root / "masks" / f"{n}.tif")
            lines.append(f"{n} {text}\n")
        (root / f"output_phrase_{split}.txt").write_text("".join(lines), encoding="utf-8")


def make_risbench(root):
    """img_rgb/<file>, mask/<file> and lines `<file> <phrase>`; those for validation name `train_...`."""
    for folder in ("img_rgb", "mask"): (root / folder).mkdir(parents=True)
    for k, split in enumerate(SPLITS):
        lines = []
        for n, (image, text, mask) in enumerate(pictures(split)):
            name = f"{'test' if split == 'test' else 'train'}_{k}_{n}.png"
            image.save(root / "img_rgb" / name)
            Image.fromarray(mask.astype(np.uint8) * 255).convert("RGB").save(root / "mask" / name)
            lines.append(f"{name} {text}\n")
        (root / f"output_phrase_{split}.txt").write_text("".join(lines), encoding="utf-8")


def make_rrsisd(root):
    """rrsisd/refs(unc).p and instances.json with run lengths, images/rrsisd/JPEGImages."""
    folder = root / "images" / "rrsisd" / "JPEGImages"
    folder.mkdir(parents=True)
    (root / "rrsisd").mkdir()
    images, annotations, refs = [], [], []
    for k, split in enumerate(SPLITS):
        for n, (image, text, mask) in enumerate(pictures(split), 1 + 10 * k):
            image.save(folder / f"{n:05}.jpg", quality=95)
            images.append(dict(id=n, file_name=f"{n:05}.jpg", width=image.width, height=image.height))
            runs = coco_mask.encode(np.asfortranarray(mask, dtype=np.uint8))
            counts = runs["counts"].decode("ascii")
            annotations.append(dict(id=n, image_id=n, category_id=1, bbox=[0, 0, 1, 1],
                                    segmentation=[dict(size=runs["size"], counts=counts)]))
            refs.append(dict(ref_id=n, ann_id=n, image_id=n, split=split,
                             sentences=[dict(sent_id=n, sent=text)]))
    whole = dict(images=images, annotations=annotations, categories=[dict(id=1, name="thing")])
    (root / "rrsisd" / "instances.json").write_text(json.dumps(whole))
    (root / "rrsisd" / "refs(unc).p").write_bytes(pickle.dumps(refs, protocol=2))


LAYOUTS = dict(refsegrs=make_refsegrs, rrsisd=make_rrsisd, risbench=make_risbench)


def counted(lines, true):
    """mIoU, oIoU and Pr@t by counting pixels. lines: COCO masks or None; true: arrays of bool."""
    def array(mask):
        if mask is None: return None
        mask = json.loads(mask) if isinstance(mask, str) else mask
        return coco_mask.decode(dict(mask, counts=mask["counts"].encode())) > 0
    shared, union = [], []
    for line, t in zip(lines, true):
        m = array(line["mask"])
        if m is None: m = np.zeros_like(t)
        shared.append((m & t).sum())
        union.append((m | t).sum())
    ious = np.array(shared) / union
    return {"mIoU": ious.mean(), "oIoU": sum(shared) / sum(union),
            **{f"Pr@{t}": (ious >= t).mean() for t in (0.5, 0.6, 0.7, 0.8, 0.9)}}


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A segmenter with two steps of training a stage, on drawn scenes."""
    folder = tmp_path_factory.mktemp("segmenter") / "model"
    assert main([*TINY, "--output_dir", str(folder)]) == 0
    return folder


@pytest.fixture(scope="module")
def refsegrs(tmp_path_factory):
    root = tmp_path_factory.mktemp("data") / "RefSegRS"
    make_refsegrs(root)
    return root


def scores_of(folder): return pd.read_csv(folder / "masks.csv").set_index("mode")


@pytest.mark.parametrize("name", LAYOUTS)
def test_a_folder_runs_from_training_to_scores(name, tmp_path, capsys):
    data, model, out = (tmp_path / part for part in (name, "model", "scores"))
    LAYOUTS[name](data)
    assert main(["train", "segment", "--dataset_name", str(data), "--output_dir", str(model), *SHORT]) == 0
    assert "trained on 4 rows" in capsys.readouterr().out
    assert main(["predict", "--mask", "--data", str(data), "--model", str(model), "--json",
                 "--thresholds", "0.3", "0.7"]) == 0
    said = capsys.readouterr().out
    (tmp_path / "masks.jsonl").write_text(said)
    lines = [json.loads(line) for line in said.splitlines()]
    assert len(lines) == 4 and {line["expression"] for line in lines} == {t for _, t, _ in pictures("test")}
    assert main(["evaluate", str(tmp_path / "masks.jsonl"), "--data", str(data), "--out", str(out)]) == 0
    assert "against test of" in capsys.readouterr().out
    found, by_hand = scores_of(out), counted(lines, [m for _, _, m in pictures("test")])
    assert {n: found[n]["standard"] for n in by_hand} == pytest.approx(by_hand)
    assert set(found.index) == set(MASK_MODES) and (found["N"] == 4).all()
    page = (out / "masks.html").read_text(encoding="utf-8")
    assert page.count("data:image/png") == 4


@pytest.mark.parametrize("name", LAYOUTS)
def test_planted_masks_get_the_scores_of_a_count(name, tmp_path, capsys):
    """Answers that are right, moved by two pixels, too large, missing: scores between 0 and 1."""
    data, out = tmp_path / name, tmp_path / "scores"
    LAYOUTS[name](data)
    rows = load_folder(data)[0]["test"]
    true = [decode_mask(m) for m in rows["mask"]]
    answers = [true[0], np.roll(true[1], 2, 0), true[2] | np.roll(true[2], 4, 1), None]
    lines = [dict(expression_id=n, mask=m if m is None else json.loads(encode_mask(m)))
             for n, m in zip(rows["expression_id"], answers)]
    (tmp_path / "masks.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert main(["evaluate", str(tmp_path / "masks.jsonl"), "--data", str(data), "--out", str(out)]) == 0
    capsys.readouterr()
    found, by_hand = scores_of(out).loc["standard"], counted(lines, true)
    assert {n: found[n] for n in by_hand} == pytest.approx(by_hand)
    assert 0.25 < by_hand["mIoU"] < 1 and by_hand["mIoU"] != by_hand["oIoU"] and found["missing"] == 0.25
    boxes = pd.read_csv(out / "modes.csv").set_index("mode").loc["standard"]
    assert boxes["unparsable"] == 0.25 and 0.25 < boxes["meanIoU"] < 1  # the boxes around the masks
    groups = pd.read_csv(out / "mask_strata.csv")
    assert groups[groups.stratum == "size"]["N"].sum() == 4


def slow(mode, answer, true):
    """(intersection, union) under a mode, pixel by pixel."""
    if answer is None: answer = np.zeros_like(true)
    if mode == "lavt":
        rows, columns = (((np.arange(480) + 0.5) * side / 480).astype(int) for side in true.shape)
        answer, true = (m[rows][:, columns] for m in (answer, true))
    if mode == "shrunken":
        def blocks(m):
            return np.array([[m[i:i + 4, j:j + 4].any() for j in range(0, m.shape[1], 4)]
                             for i in range(0, m.shape[0], 4)])
        answer, true = blocks(answer), blocks(true)
    return (answer & true).sum(), (answer | true).sum()


def test_every_mode_agrees_with_a_slower_count():
    rng = np.random.default_rng(0)
    def blob(height, width):
        y, x = rng.integers(0, height - 8), rng.integers(0, width - 8)
        mask = np.zeros((height, width), bool)
        mask[y:y + rng.integers(1, 8), x:x + rng.integers(1, 8)] = True
        return mask
    images, true, answers, levels = [], [], [], []
    for k in range(12):
        size = (30 + k, 41)
        images.append(f"{k // 3}")
        true.append(blob(*size))
        beside = true[-1] if k % 2 else np.roll(true[-1], 1)
        answers.append(None if k == 5 else beside | blob(*size))
        levels.append(None if k == 5 else [answers[-1], true[-1]])
    def texts(masks): return [m if m is None else encode_mask(m) for m in masks]
    table = mask_modes(texts(answers), texts(true), images, draws=1,
                       levels=[l if l is None else texts(l) for l in levels]).set_index("mode")
    for mode in MASK_MODES:
        kept = [2, 5, 8, 11] if mode == "last_of_image" else range(12)
        given = [levels[k] or [None] if mode == "thresholds" else [answers[k]] for k in kept]
        pairs = [[slow(mode, m, true[k]) for m in masks] for k, masks in zip(kept, given)]
        ious = np.array([np.mean([i / u for i, u in pair]) for pair in pairs])
        shared, union = np.sum([np.sum(pair, 0) for pair in pairs], 0)
        oiou = ious.mean() if mode == "miou_as_oiou" else shared / union
        assert table["mIoU"][mode] == pytest.approx(ious.mean()), mode
        assert table["oIoU"][mode] == pytest.approx(oiou), mode
        if mode != "thresholds": assert table["Pr@0.5"][mode] == pytest.approx((ious >= 0.5).mean()), mode
    assert table["mIoU"].nunique() >= 4


# ---- bad input

@pytest.mark.parametrize("mask, said", [
    (dict(size=[2, 3], counts=[1, 4]), "RLE covers 5 of 6 pixels"),
    (dict(size=[2, 3], counts="~~"), "does not belong in run lengths"),
    (dict(size=[2, 3], counts=[-1, 7]), "run lengths must be whole numbers"),
    (dict(size=[10 ** 6, 10 ** 6], counts=[10 ** 12]), "no usable image size"),
    (dict(counts=[6]), "size"), ("not json", "not JSON"),
    (7, "not a JSON object"), ([1, 2], "not a JSON object")])
def test_a_mask_that_lies_is_told_with_its_line(mask, said, tmp_path):
    path = tmp_path / "masks.jsonl"
    path.write_text(json.dumps(dict(expression_id="a", mask=mask)) + "\n")
    with pytest.raises(ValueError, match=f"line 1: mask: .*{re.escape(said)}"): load_predictions(path)


def evaluated(lines, data, tmp_path, capsys):
    (tmp_path / "masks.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    code = main(["evaluate", str(tmp_path / "masks.jsonl"), "--data", str(data)])
    return code, capsys.readouterr()


def test_masks_of_another_size_and_strange_levels_are_refused(refsegrs, tmp_path, capsys):
    rows = load_folder(refsegrs)[0]["test"]
    lines = [dict(expression_id=n, mask=m) for n, m in zip(rows["expression_id"], rows["mask"])]
    small = [dict(lines[0], mask=encode_mask(np.ones((10, 20)))), *lines[1:]]
    code, said = evaluated(small, refsegrs, tmp_path, capsys)
    assert code == 2 and "output_phrase_test:1: the predicted mask is 20x10, the true one 112x112" in said.err
    code, said = evaluated([dict(lines[0], masks=[1]), *lines[1:]], refsegrs, tmp_path, capsys)
    assert code == 2 and "masks is not an object {threshold: mask}" in said.err
    code, said = evaluated([dict(lines[0], masks={"0.3": "{}"}), *lines[1:]], refsegrs, tmp_path, capsys)
    assert code == 2 and "output_phrase_test:1: masks: " in said.err


def test_rows_without_a_mask_are_told_and_not_scored(tmp_path, capsys):
    """Two rows, one with a mask: only that one is scored, and the user hears of it. Without any mask in the
    data, the boxes are scored alone."""
    Image.new("RGB", (16, 16)).save(tmp_path / "a.png")
    square = np.zeros((16, 16), bool)
    square[:8, :8] = True
    row = dict(image="a.png", expression="the ship", box=[0, 0, 8, 8])
    rows = [dict(row, expression_id="1", mask=encode_mask(square)), dict(row, expression_id="2")]
    lines = [dict(expression_id=n, mask=encode_mask(square[:, ::-1] | square)) for n in "12"]
    data = tmp_path / "data"
    data.mkdir()
    Image.new("RGB", (16, 16)).save(data / "a.png")
    (data / "test.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    code, said = evaluated(lines, data, tmp_path, capsys)
    assert code == 0 and "1 of 2 rows of the data have no mask" in said.err and "masks\n" in said.out
    assert re.search(r"mIoU +0\.500 ", said.out)
    (data / "test.jsonl").write_text("".join(json.dumps(dict(row, expression_id=n)) + "\n" for n in "12"))
    code, said = evaluated(lines, data, tmp_path, capsys)
    assert code == 0 and "2 of 2 rows of the data have no mask" in said.err and "masks\n" not in said.out


def test_empty_and_misfit_masks_of_the_data_are_findings(tmp_path):
    make_refsegrs(tmp_path)
    Image.fromarray(np.zeros((112, 112), np.uint8)).save(tmp_path / "masks" / "20.tif")
    Image.fromarray(np.ones((56, 112), np.uint8)).save(tmp_path / "masks" / "21.tif")
    splits, findings = load_folder(tmp_path)
    said = " ".join(str(f) for f in findings)
    assert len(splits["test"]) == 2
    assert "mask 20.tif is empty" in said and "mask 112x56, image is 112x112" in said


LONG = "the ship " * 45


def test_a_long_expression_is_said_and_not_cut(refsegrs, trained, tmp_path, capsys):
    [image, *_] = (refsegrs / "images").iterdir()
    assert main(["predict", "--mask", "--model", str(trained), str(image), LONG]) == 0
    assert "no mask: CLIP reads 77 tokens, this expression has 92" in capsys.readouterr().out
    data = tmp_path / "data"
    make_refsegrs(data)
    path = data / "output_phrase_train.txt"
    path.write_text(path.read_text() + f"0 {LONG}\n")
    words = ["train", "segment", "--dataset_name", str(data), "--output_dir", str(tmp_path / "m"), *SHORT]
    assert main(words) == 2
    said = capsys.readouterr().err
    assert "1 of 5 expressions cannot be read, first output_phrase_train:5: CLIP reads 77 tokens" in said
    assert not (tmp_path / "m").exists()
    assert main([*words, "--skip_long", "true"]) == 0
    assert "trained on 4 rows" in capsys.readouterr().out


@pytest.mark.parametrize("words, said", [
    (["--mask"], "name a picture and an expression"),
    (["--mask", "PICTURE", "the ship", "--data", "DATA"], "(one of them)"),
    (["--mask", "PICTURE", "the ship"], "--mask needs --model"),
    (["--mask", "PICTURE", "the ship", "--model", "EMPTY"], "segmenter.json is missing"),
    (["--mask", "PICTURE", "the ship", "--model", "MODEL", "--thresholds", "1.5"], "threshold 1.5"),
    (["PICTURE", "the ship", "--thresholds", "0.5"], "--thresholds is for --mask"),
    (["--mask", "nothing.png", "the ship", "--model", "MODEL"], "nothing.png not found"),
    (["--mask", "PICTURE", " ", "--model", "MODEL"], "is empty"),
    (["--mask", "--data", "DATA", "--split", "dev", "--model", "MODEL"], "no split 'dev': use one of train")])
def test_wrong_questions_are_one_sentence(words, said, refsegrs, trained, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("rsground_nb.maskfiles.SEGMENTER", tmp_path / "none")
    (tmp_path / "empty").mkdir()
    picture = refsegrs / "images" / "20.tif"
    places = dict(PICTURE=picture, DATA=refsegrs, EMPTY=tmp_path / "empty", MODEL=trained)
    assert main(["predict", *(str(places.get(w, w)) for w in words)]) == 2
    err = capsys.readouterr().err
    assert said in err and err.startswith("rsground: ") and err.count("\n") == 1


@pytest.mark.parametrize("words, said", [
    (["--config", "none.yaml"], "no such file; the package has"),
    (["--use", "dense", "box"], "use: unknown part 'box'"),
    (["--align_step", "3"], "did you mean --align_steps"),
    (["--scenes", "0"], "scenes 0: at least 1"),
    (["--dataset_name", "nowhere"], "nowhere is not a folder"),
    (["--dataset_name", "DATA", "--dataset_train_split", "dev"], "no split 'dev'"),
    (["--clip", "EMPTY"], "holds no CLIP tokenizer"),
    (["--clip", "ABSENT"], "no folder with CLIP's tokenizer here"),
    (["--output_dir", "DATA"], "holds no segmenter: choose another output_dir")])
def test_wrong_settings_are_one_sentence(words, said, refsegrs, tmp_path, capsys):
    (tmp_path / "empty").mkdir()
    places = dict(DATA=refsegrs, EMPTY=tmp_path / "empty", ABSENT=tmp_path / "absent")
    words = [str(places.get(w, w)) for w in words]
    if "--output_dir" not in words: words += ["--output_dir", str(tmp_path / "m")]
    assert main(["train", "segment", "--scenes", "2", *words]) == 2
    err = capsys.readouterr().err
    assert said in err and err.count("\n") == 1 and not (tmp_path / "m").exists()


def test_a_sam_folder_without_processor_and_a_damaged_segmenter(tmp_path, trained):
    SamModel(tiny_sam_config()).save_pretrained(tmp_path / "sam")
    with pytest.raises(ValueError, match="holds no SAM model with preprocessor_config.json"):
        load_sam(tmp_path / "sam")
    for path in trained.iterdir():
        if path.is_file(): (tmp_path / path.name).write_bytes(path.read_bytes())
    (tmp_path / "model.safetensors").write_bytes((trained / "model.safetensors").read_bytes()[:1000])
    with pytest.raises(ValueError, match="the segmenter in .* is damaged"): segmenter_to_ask(str(tmp_path))
    load_clip()[0].save_pretrained(tmp_path / "clip")
    with pytest.raises(ValueError, match="clip holds no CLIP tokenizer: tokenizer.json is missing"):
        load_clip(tmp_path / "clip")


# ---- answers and settings

def test_pictures_reach_sam_normalised(tmp_path):
    """As the folder's processor says, without cropping; raw pixels are a known mistake."""
    mean, std = [0.1, 0.2, 0.3], [0.4, 0.5, 0.6]
    SamModel(tiny_sam_config()).save_pretrained(tmp_path)
    SamImageProcessorPil(image_mean=mean, image_std=std).save_pretrained(tmp_path)
    _, eyes = load_sam(tmp_path)
    pixels = eyes(Image.new("RGB", (30, 60), "white"), return_tensors="pt").pixel_values
    assert pixels.shape == (1, 3, 112, 112)
    for channel, m, s in zip(pixels[0], mean, std): assert torch.allclose(channel, torch.tensor((1 - m) / s))


def test_a_picture_of_any_size_gets_a_mask_of_its_size(trained, tmp_path, capsys):
    image, text, _ = pictures("test")[0]
    image.resize((301, 97)).save(tmp_path / "a.png")
    out = tmp_path / "masked.png"
    words = [str(tmp_path / "a.png"), text, "--out", str(out)]
    assert main(["predict", "--mask", "--model", str(trained), *words]) == 0
    capsys.readouterr()
    [line] = mask_lines(segmenter_to_ask(str(trained)), [(str(tmp_path / "a.png"), text, "1")], (0.5,))
    assert decode_mask(line["mask"]).shape == (97, 301) and line["masks"] == {"0.5": line["mask"]}
    with Image.open(out) as drawn: assert max(drawn.size) == 448
    with pytest.raises(Defect): list(mask_lines(None, [(str(tmp_path), text, "1")]))


def test_answers_do_not_depend_on_the_batch(trained, refsegrs):
    model, image = segmenter_to_ask(str(trained)), str(refsegrs / "images" / "20.tif")
    questions = [(image, "the ship", "1"), (str(refsegrs / "images" / "21.tif"), "the red car", "2"),
                 (image, LONG, "3"), (image, "the car on the left", "4")]
    together = list(mask_lines(model, questions))
    alone = [line for q in questions for line in mask_lines(model, [q])]
    assert [line["expression_id"] for line in together] == list("1234") and together[2]["mask"] is None
    for a, b in zip(together, alone):
        if a["mask"]: assert (decode_mask(a["mask"]) != decode_mask(b["mask"])).mean() < 0.001


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("*_segment.yaml")), ids=lambda p: p.stem)
def test_a_ready_file_names_settings_only(path):
    args, size = parse_segment(["--config", str(path)])
    for name, value in yaml.safe_load(path.read_text()).items():
        found = getattr(args, name) if hasattr(args, name) else getattr(size, name)
        assert found == value and type(found) is type(value), name
    assert args.skip_long or path.stem == "tiny_segment"


def test_the_figures_in_the_ready_files_are_the_plan():
    ready = sorted(CONFIGS.glob("clip_sam_24gb_*_segment.yaml"))
    size = parse_segment(["--config", str(ready[0])])[1]
    found = segment_memory(size, *base_shapes())
    assert found.sum() < 16
    for path in ready: assert f": {plan_line(found)}\n" in path.read_text(), "write the comment anew"


def test_a_second_call_finds_the_model_and_other_settings_are_refused(trained, capsys):
    words, before = [*TINY, "--output_dir", str(trained)], (trained / "model.safetensors").stat().st_mtime_ns
    assert main(words) == 0 and (trained / "model.safetensors").stat().st_mtime_ns == before
    assert main([*words, "--structure", "0.5"]) == 2
    assert "holds another run" in capsys.readouterr().err


def test_lora_of_sams_encoder_is_trained_in_the_last_stage_and_kept_frozen_without():
    def lora(rank):
        model = make_segmenter(lora_rank=2, sam_lora_rank=rank)
        trained = {id(p) for p in trained_in(model, "ground")}
        inside = [p for p in model.sam.vision_encoder.parameters() if p.requires_grad]
        return len(inside), all(id(p) in trained for p in inside)
    assert lora(2)[0] > 0 and lora(2)[1]
    torch.manual_seed(0)
    model = make_segmenter(lora_rank=2, sam_lora_rank=0)
    assert not any("lora_" in n for n, _ in model.sam.vision_encoder.named_parameters())
    assert any("lora_" in n and p.requires_grad for n, p in model.aligner.clip.named_parameters())


def test_a_card_of_the_report_shows_the_mask(refsegrs, tmp_path):
    rows = load_folder(refsegrs)[0]["test"].select(range(3))
    box = dict(answer="", predicted=None, reason="empty", iou=0.0)
    for stage in STAGES: write_predictions([box] * 3, tmp_path / f"{stage}_test.jsonl")
    plain = gallery(tmp_path, rows, "test")
    assert [(c["masked"], c["mask_iou"]) for c in plain] == [(False, None)] * 3
    half = decode_mask(rows[1]["mask"])
    half &= np.cumsum(half).reshape(half.shape) > half.sum() // 2
    masks = [dict(mask=rows[0]["mask"]), dict(mask=encode_mask(half)), dict(mask=None)]
    write_predictions(masks, tmp_path / "segmenter_test.jsonl")
    cards = gallery(tmp_path, rows, "test")
    share = half.sum() / decode_mask(rows[1]["mask"]).sum()
    assert [c["mask_iou"] for c in cards] == [1, pytest.approx(share), None]
    assert [c["picture"] != p["picture"] for c, p in zip(cards, plain)] == [True, True, False]


def test_the_interval_of_one_picture_is_a_point(refsegrs, tmp_path):
    rows = load_folder(refsegrs)[0]["test"].select([0])
    path = tmp_path / "masks.jsonl"
    path.write_text(json.dumps(dict(expression_id=rows[0]["expression_id"], mask=rows[0]["mask"])) + "\n")
    found = evaluate_masks(path, rows).modes.set_index("mode").loc["standard"]
    assert found["mIoU"] == found["mIoU_low"] == found["mIoU_high"] == found["oIoU"] == 1
