"""Folders of models: what transformers alone reads of a trained one, and what a folder that somebody else made may not do here."""
import importlib.util
import json
import os
import pickle
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from peft import get_peft_model
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import AutoModelForImageTextToText

from conftest import ROOT
from test_model import small_folder
from rsground_nb.model import PROCESSOR_FILES, STOCK, adapt, load_processor, load_tiny, load_vlm, make_tiny, student_codec
from rsground_nb.sft import save_stage

KINDS = ["qwen2_5_vl", "qwen3_vl"]
TINY = ROOT / "rsground_nb" / "assets" / "tiny"
MOST = 200 * 200  # pixels


def as_on_the_hub(folder, kind):
    """The processor files as transformers 4 wrote them, which is how the published models lie on the hub."""
    content = json.loads((folder / "processor_config.json").read_text())
    eyes = {**content["image_processor"], "min_pixels": 3136, "max_pixels": 12845056, "processor_class": STOCK[kind][0]}
    del eyes["size"]
    (folder / "preprocessor_config.json").write_text(json.dumps(eyes))
    (folder / "processor_config.json").unlink()
    if kind == "qwen3_vl": (folder / "video_preprocessor_config.json").write_text(json.dumps({**content["video_processor"], "size": {"longest_edge": 50176, "shortest_edge": 3136}}))
    bpe = json.loads((folder / "tokenizer.json").read_text())["model"]
    (folder / "vocab.json").write_text(json.dumps(bpe["vocab"]))
    (folder / "merges.txt").write_text("\n".join(" ".join(pair) for pair in bpe["merges"]))
    (folder / "chat_template.json").write_text(json.dumps({"chat_template": "{# the base's own #}" + (folder / "chat_template.jinja").read_text()}))
    (folder / "chat_template.jinja").unlink()
    return folder


class Finished:  # what save_stage wants of a trainer
    def __init__(self, model):
        self.model, self.state, self.accelerator = model, type("State", (), {"log_history": [{"loss": 1.0}]}), type("Accelerator", (), {"unwrap_model": staticmethod(lambda m: m)})


def trained(base, folder):
    folder.mkdir()
    model, processor = load_vlm(str(base), MOST)
    save_stage(Finished(get_peft_model(model, adapt(model, 2))), processor, folder, dict(frozen="", trained=""), 0.0)
    return folder / "model"


FRESH = """
import json, sys
from PIL import Image
import transformers
from transformers import AutoImageProcessor, AutoModelForImageTextToText, AutoProcessor
for folder, name in zip(sys.argv[1::2], sys.argv[2::2]):
    processor, named = AutoProcessor.from_pretrained(folder), getattr(transformers, name).from_pretrained(folder)
    assert type(processor) is type(named) and type(processor).__name__ == name, type(processor)
    assert processor.video_processor is not None and not [m for m in sys.modules if m.startswith("rsground_nb")]
    processor.image_processor = AutoImageProcessor.from_pretrained(folder, backend="pil")  # the stand-in for torchvision can do nothing with pictures
    said = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "Locate the ship."}]}]
    text = processor.apply_chat_template(said, add_generation_prompt=True, tokenize=False)
    batch = processor(text=[text], images=[[Image.new("RGB", (300, 200), "green")]], return_tensors="pt")
    model = AutoModelForImageTextToText.from_pretrained(folder)
    print(json.dumps([text, batch["input_ids"].tolist(), list(batch["pixel_values"].shape), model(**batch).logits.sum().item(), str(model.dtype)]))
"""

STAND_IN = {  # the names of torchvision that transformers wants when it loads a video processor; no picture goes through them
    "__init__.py": "__version__ = '0.28.0'", "io.py": "", "transforms/functional.py": "pil_to_tensor = None", "transforms/v2/__init__.py": "", "transforms/v2/functional.py": "",
    "transforms/__init__.py": "import enum\nInterpolationMode = enum.Enum('InterpolationMode', 'NEAREST NEAREST_EXACT BOX BILINEAR HAMMING BICUBIC LANCZOS')"}


def fresh(folders, tmp_path, with_torchvision=True):
    """What a process with transformers alone makes of [folder, class name, ...]. Where torchvision is missing, a stand-in takes its place."""
    if with_torchvision and not importlib.util.find_spec("torchvision"):
        for name, text in STAND_IN.items():
            path = tmp_path / "stand_in" / "torchvision" / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text)
    return subprocess.run([sys.executable, "-c", FRESH, *map(str, folders)], cwd=tmp_path, env={**os.environ, "PYTHONPATH": str(tmp_path / "stand_in")}, capture_output=True, text=True)


def test_folders_load_with_transformers_alone(tmp_path):
    """Trained ones of two kinds, the shipped tiny model, and what is trained from it."""
    bases = {}
    for kind in KINDS:
        (tmp_path / kind).mkdir()
        bases[kind] = as_on_the_hub(small_folder(kind, tmp_path / kind), kind)
    folders = {TINY: "qwen3_vl", trained("tiny", tmp_path / "tiny-run"): "qwen3_vl", **{trained(base, tmp_path / f"{kind}-run"): kind for kind, base in bases.items()}}
    done = fresh([word for folder, kind in folders.items() for word in (folder, STOCK[kind][0])], tmp_path)
    assert done.returncode == 0, done.stderr
    for folder, line in zip(folders, done.stdout.splitlines(), strict=True):
        text, ids, shape, total, dtype = json.loads(line)
        model, ours = load_vlm(str(folder), MOST if folder != TINY else 112 * 112)
        batch = ours(text=[text], images=[[Image.new("RGB", (300, 200), "green")]], return_tensors="pt")
        assert text.count("<|image_pad|>") == 1 and dtype == "torch.float32"
        assert batch["input_ids"].tolist() == ids and list(batch["pixel_values"].shape) == shape
        with torch.no_grad(): assert model(**batch).logits.sum().item() == pytest.approx(total, rel=1e-4)


@pytest.mark.parametrize("kind", KINDS)
def test_all_processor_files_of_the_base_are_in_the_trained_folder(kind, tmp_path):
    (tmp_path / "base").mkdir()
    base = as_on_the_hub(small_folder(kind, tmp_path / "base"), kind)
    folder = trained(base, tmp_path / "run")
    had = {name for name in PROCESSOR_FILES if (base / name).exists()}
    assert had == {name for name in PROCESSOR_FILES if (folder / name).exists()} and len(had) == 6 + (kind == "qwen3_vl")
    for name in had: assert name.endswith("config.json") or (base / name).read_bytes() == (folder / name).read_bytes()
    eyes, before = (json.loads((place / "preprocessor_config.json").read_text()) for place in (folder, base))
    assert eyes == {**before, "max_pixels": MOST, "size": {"shortest_edge": 3136, "longest_edge": MOST}} and eyes["processor_class"] == STOCK[kind][0]


def test_without_torchvision_a_folder_gives_an_error_and_no_tokenizer(tmp_path):
    if importlib.util.find_spec("torchvision"): pytest.skip("torchvision is installed: the test above asks for the real processor")
    done = fresh([TINY, "Qwen3VLProcessor"], tmp_path, with_torchvision=False)
    assert done.returncode == 1 and "ImportError" in done.stderr and "requires the Torchvision library" in done.stderr


def test_a_processor_may_be_saved_where_it_came_from(tmp_path):
    model, processor = load_tiny()
    processor.save_pretrained(tmp_path)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    shutil.copy(TINY / "config.json", tmp_path)
    load_processor(str(tmp_path), 112 * 112).save_pretrained(tmp_path)
    assert before == {name: (tmp_path / name).read_bytes() for name in before}
