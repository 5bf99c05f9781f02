"""Pixels: what is decoded is the picture that the annotator saw, in one frame and not flat."""
import io
import json

import numpy as np
import pytest
from PIL import ExifTags, Image

from rsground_nb.folders import load_folder, to_dataset
from rsground_nb.reading import Defect, grey_levels, image_mask, image_size, read_image
from rsground_nb.doctor import examine
from rsground_nb.files import read_rows

SLANT = np.linspace(0, 1, 6000).reshape(60, 100)


def folder_with(root, name, picture, box=(10, 20, 30, 40), **more):
    """A data set of one row whose picture is `picture`, an image or an array."""
    root.mkdir(exist_ok=True)
    exif = more.pop("exif", None)
    if isinstance(picture, np.ndarray): picture = Image.fromarray(picture)
    picture.save(root / name, **({"exif": exif} if exif else {}))
    (root / "train.jsonl").write_text(json.dumps(dict(image=name, expression="the pad", box=box, **more))
                                      + "\n")
    return root


def note(turn):
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = turn
    return exif


def levels(picture): return len(np.unique(np.asarray(picture.convert("L"))))


@pytest.mark.parametrize("case", ["exif_turned", "tiff_16_bit", "tiff_float"])
def test_the_cases_from_the_field(shared, case):
    line = next(c for c in map(json.loads, (shared / "field_cases" / "cases.jsonl").open())
                if c["id"] == case)
    splits, findings = load_folder(shared / "field_cases" / line["input"])
    row = splits["train"][0]
    assert row["image"].size == (row["width"], row["height"]) and row["image"].mode == "RGB"
    if "same_frame" in line["expected"]: assert any("EXIF" in str(f) for f in findings)
    if "not_flat" in line["expected"]: assert levels(row["image"]) >= 100 and findings == []


@pytest.mark.parametrize("turn", range(1, 9))
@pytest.mark.parametrize("ending", ["jpg", "png", "tif", "webp"])
def test_size_and_pixels_are_in_one_frame_and_a_turn_is_said(tmp_path, ending, turn):
    lying = np.zeros((60, 100, 3), np.uint8)
    lying[:20, :30] = 255  # the upper left corner
    root = folder_with(tmp_path / "set", f"a.{ending}", lying, exif=note(turn))
    splits, findings = load_folder(root)
    row = splits["train"][0]
    assert (row["image"].size == (row["width"], row["height"]) == ((100, 60) if turn < 5 else (60, 100))
            == image_size(root / f"a.{ending}"))
    bright = np.argwhere(np.asarray(row["image"].convert("L")) > 128).mean(0) / (row["height"], row["width"])
    bottom, right = turn in (3, 4, 7, 8), turn in (2, 3, 6, 7)
    bottom, right = {5: (0, 0), 6: (0, 1), 7: (1, 1), 8: (1, 0)}.get(turn, (bottom, right))
    assert (abs(bright[0] - (5 / 6 if bottom else 1 / 6)) < 0.04
            and abs(bright[1] - (0.85 if right else 0.15)) < 0.04)
    for said in (findings, examine(root).findings):
        assert [f.kind for f in said] == ["turned image"] * (turn > 1)


def test_the_size_before_turning_is_refused_by_the_doctor_and_said_by_the_reader(tmp_path):
    root = folder_with(tmp_path / "set", "a.jpg", SLANT.astype(np.uint8), width=100, height=60, exif=note(6))
    assert any("declared 100x60, image is 60x100, turned by EXIF" in str(f) and f.kept
               for f in load_folder(root)[1])
    report = examine(root)
    assert report.rows == [] and any("turned by EXIF" in str(f) and not f.kept for f in report.findings)


def test_a_reader_looks_at_a_few_headers_of_a_large_folder_and_at_no_pixel(tmp_path, monkeypatch):
    root = tmp_path / "set"
    folder_with(root, "0.jpg", Image.new("RGB", (50, 40)))
    for k in range(1, 300): (root / f"{k}.jpg").write_bytes((root / "0.jpg").read_bytes())
    (root / "train.jsonl").write_text("".join(
        json.dumps(dict(image=f"{k}.jpg", expression="a", box=[1, 2, 3, 4], width=50, height=40)) + "\n"
        for k in range(300)))
    opened, real = [], Image.open
    monkeypatch.setattr(Image, "open", lambda *a, **k: opened.append(a) or real(*a, **k))
    monkeypatch.setattr("PIL.ImageFile.ImageFile.load", lambda *a: pytest.fail("a pixel was decoded"))
    assert len(read_rows(root)[1]) == 300 and 0 < len(opened) <= 60


DEEP = {"16 bit, 200 to 4000": (200 + 3800 * SLANT).astype(np.uint16),
        "16 bit, whole range": (65535 * SLANT).astype(np.uint16), "32 bit": (1e6 * SLANT).astype(np.int32),
        "signed": (4000 * SLANT - 2000).astype(np.int32), "share": SLANT.astype(np.float32),
        "negative": (SLANT - 5).astype(np.float32), "tiny": (1e-9 * SLANT).astype(np.float32)}


@pytest.mark.parametrize("what", DEEP)
def test_one_band_of_more_than_8_bits_is_scaled(tmp_path, what):
    row = load_folder(folder_with(tmp_path / "set", "a.tif", DEEP[what]))[0]["train"][0]
    grey = np.asarray(row["image"].convert("L")).astype(int)
    assert (levels(row["image"]) >= 100 and grey.min() == 0 and grey.max() == 255
            and (np.diff(grey.ravel()) >= 0).all())


def test_a_hot_pixel_and_holes_do_not_make_a_picture_flat():
    for spoilt in (65535.0, np.nan, np.inf, -np.inf, -3.4e38):
        values = SLANT.astype(np.float32)
        values[:1] = spoilt if not np.isfinite(spoilt) or spoilt < 0 else values[:1]
        values[5, 5] = spoilt
        assert len(np.unique(grey_levels(values))) >= 100
    holes = SLANT.copy()
    holes[:20] = -9999
    assert len(np.unique(grey_levels(holes, -9999.0))) >= 100


def test_holes_that_would_make_it_flat_are_refused_with_the_way_out(tmp_path):
    holes = SLANT.astype(np.float32)
    holes[:20] = -9999
    root = folder_with(tmp_path / "set", "a.tif", holes)
    report = examine(root)
    assert (report.rows == [] and [f.kind for f in report.findings] == ["flat image"]
            and "gdal_translate" in str(report.findings[0]))
    with pytest.raises(Defect, match="a.tif: .* grey levels would be left"): load_folder(root)[0]["train"][0]
    Image.fromarray(holes).save(root / "a.tif", tiffinfo={42113: "-9999"})  # as GDAL marks them
    assert levels(load_folder(root)[0]["train"][0]["image"]) >= 100


def test_few_values_stay_few_and_a_constant_picture_is_no_error():
    for values in ([0, 1, 5], [7], [-3, 900]):
        assert len(np.unique(grey_levels(np.resize(values, (30, 40)).astype(np.int32)))) == len(values)
    assert grey_levels(np.pad([[9]], 50)).max() == 255  # one bright pixel of 10,201
    with pytest.raises(Defect, match="no pixel holds a number"): grey_levels(np.full((3, 3), np.nan))


def deep_png(pixels):
    """A 16-bit RGB PNG, which Pillow reads but does not write."""
    import struct
    import zlib
    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
    rows = b"".join(b"\0" + line.astype(">u2").tobytes() for line in pixels)
    height, width = pixels.shape[:2]
    return (b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 16, 2, 0, 0, 0))
            + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b""))


@pytest.mark.parametrize("highest", [4095, 16383])
def test_16_bit_colours_of_a_camera_with_fewer_bits_are_refused(highest):
    with pytest.raises(Defect, match="16-bit colours .* gdal_translate"):
        read_image(deep_png(np.dstack([highest * SLANT] * 3)))
    assert levels(read_image(deep_png(np.dstack([65535 * SLANT] * 3)))) >= 100


@pytest.mark.parametrize("mode", ["1", "L", "P", "LA", "RGBA", "CMYK", "RGB"])
def test_every_mode_becomes_rgb(mode):
    packed = io.BytesIO()
    Image.new("RGB", (20, 10), "red").convert(mode).save(packed, "TIFF")
    assert (read_image(packed.getvalue()).mode, read_image(packed.getvalue()).size) == ("RGB", (20, 10))


def test_a_mask_of_floats_and_a_turned_mask(tmp_path):
    inside = (SLANT > 0.5).astype(np.float32) / 4
    Image.fromarray(inside).save(tmp_path / "m.tif")
    assert (image_mask(tmp_path / "m.tif", (100, 60)) == (inside > 0)).all()
    Image.fromarray(np.uint8(255 * (inside > 0))).save(tmp_path / "m.png", exif=note(6))
    assert (image_mask(tmp_path / "m.png", (60, 100)) == np.rot90(inside > 0, -1)).all()


def test_a_column_of_pictures_in_memory_is_read_the_same_way():
    packed = io.BytesIO()
    Image.fromarray(DEEP["16 bit, 200 to 4000"]).save(packed, "PNG")
    rows = to_dataset([dict(image={"bytes": packed.getvalue(), "path": None}, box=[1, 2, 3, 4])])
    assert levels(rows[0]["image"]) == levels(rows.select([0])["image"][0]) >= 100
