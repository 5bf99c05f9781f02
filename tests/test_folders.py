"""Folders of models: what transformers alone reads of a trained one, and what a folder that
somebody else made may not do here."""
import importlib.util
import json
import os
import pickle
import shutil
import subprocess
import sys

import pytest
import torch
from peft import get_peft_model
from PIL import Image
from safetensors.torch import load_file, save_file

from conftest import ROOT
from test_model import small_folder
from rsground_nb.loading import PROCESSOR_FILES, STOCK, load_processor
from rsground_nb.model import adapt, load_tiny, load_vlm, student_codec
from rsground_nb.safeguard import save_stage

KINDS = ["qwen2_5_vl", "qwen3_vl"]
TINY = ROOT / "rsground_nb" / "assets" / "tiny"
MOST = 200 * 200  # pixels


def as_on_the_hub(folder, kind):
    """The processor files as transformers 4 wrote them, which is how the published models lie on the hub."""
    content = json.loads((folder / "processor_config.json").read_text())
    eyes = {**content["image_processor"], "min_pixels": 3136, "max_pixels": 12845056,
            "processor_class": STOCK[kind][0]}
    del eyes["size"]
    (folder / "preprocessor_config.json").write_text(json.dumps(eyes))
    (folder / "processor_config.json").unlink()
    if kind == "qwen3_vl":
        (folder / "video_preprocessor_config.json").write_text(json.dumps(
            {**content["video_processor"], "size": {"longest_edge": 50176, "shortest_edge": 3136}}))
    bpe = json.loads((folder / "tokenizer.json").read_text())["model"]
    (folder / "vocab.json").write_text(json.dumps(bpe["vocab"]))
    (folder / "merges.txt").write_text("\n".join(" ".join(pair) for pair in bpe["merges"]))
    (folder / "chat_template.json").write_text(
        json.dumps({"chat_template": "{# the base's own #}" + (folder / "chat_template.jinja").read_text()}))
    (folder / "chat_template.jinja").unlink()
    return folder


class Finished:  # what save_stage wants of a trainer
    def __init__(self, model):
        self.model, self.state, self.accelerator = model, type("State", (), {"log_history": [
            {"loss": 1.0}]}), type("Accelerator", (), {"unwrap_model": staticmethod(lambda m: m)})


def trained(base, folder):
    folder.mkdir()
    model, processor = load_vlm(str(base), MOST)
    save_stage(Finished(get_peft_model(model, adapt(model, 2))), processor, folder,
               dict(frozen="", trained=""), 0.0)
    return folder / "model"


FRESH = """
import json, sys
from PIL import Image
import transformers
from transformers import AutoImageProcessor, AutoModelForImageTextToText, AutoProcessor
for folder, name in zip(sys.argv[1::2], sys.argv[2::2]):
    processor = AutoProcessor.from_pretrained(folder)
    named = getattr(transformers, name).from_pretrained(folder)
    assert type(processor) is type(named) and type(processor).__name__ == name, type(processor)
    assert processor.video_processor is not None
    assert not [m for m in sys.modules if m.startswith("rsground_nb")]
    # the stand-in for torchvision can do nothing with pictures
    processor.image_processor = AutoImageProcessor.from_pretrained(folder, backend="pil")
    said = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "Locate the ship."}]}]
    text = processor.apply_chat_template(said, add_generation_prompt=True, tokenize=False)
    batch = processor(text=[text], images=[[Image.new("RGB", (300, 200), "green")]], return_tensors="pt")
    model = AutoModelForImageTextToText.from_pretrained(folder)
    print(json.dumps([text, batch["input_ids"].tolist(), list(batch["pixel_values"].shape),
                      model(**batch).logits.sum().item(), str(model.dtype)]))
"""

# the names of torchvision that transformers wants when it loads a video processor; no picture goes through
# them
STAND_IN = {
    "__init__.py": "__version__ = '0.28.0'", "io.py": "", "transforms/functional.py": "pil_to_tensor = None",
    "transforms/v2/__init__.py": "", "transforms/v2/functional.py": "",
    "transforms/__init__.py": "import enum\nInterpolationMode = enum.Enum('InterpolationMode', "
    "'NEAREST NEAREST_EXACT BOX BILINEAR HAMMING BICUBIC LANCZOS')"}


def fresh(folders, tmp_path, with_torchvision=True):
    """What a process with transformers alone makes of [folder, class name, ...]. Where torchvision is
    missing, a stand-in takes its place."""
    if with_torchvision and not importlib.util.find_spec("torchvision"):
        for name, text in STAND_IN.items():
            path = tmp_path / "stand_in" / "torchvision" / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text)
    return subprocess.run([sys.executable, "-c", FRESH, *map(str, folders)], cwd=tmp_path,
                          env={**os.environ, "PYTHONPATH": str(tmp_path / "stand_in")}, capture_output=True,
                          text=True)


def test_folders_load_with_transformers_alone(tmp_path):
    """Trained ones of two kinds, the shipped tiny model, and what is trained from it."""
    bases = {}
    for kind in KINDS:
        (tmp_path / kind).mkdir()
        bases[kind] = as_on_the_hub(small_folder(kind, tmp_path / kind), kind)
    folders = {TINY: "qwen3_vl", trained("tiny", tmp_path / "tiny-run"): "qwen3_vl",
               **{trained(base, tmp_path / f"{kind}-run"): kind for kind, base in bases.items()}}
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
    assert (had == {name for name in PROCESSOR_FILES if (folder / name).exists()}
            and len(had) == 6 + (kind == "qwen3_vl"))
    for name in had:
        assert name.endswith("config.json") or (base / name).read_bytes() == (folder / name).read_bytes()
    eyes, before = (json.loads((place / "preprocessor_config.json").read_text()) for place in (folder, base))
    assert (eyes == {**before, "max_pixels": MOST, "size": {"shortest_edge": 3136, "longest_edge": MOST}}
            and eyes["processor_class"] == STOCK[kind][0])


def test_without_torchvision_a_folder_gives_an_error_and_no_tokenizer(tmp_path):
    if importlib.util.find_spec("torchvision"):
        pytest.skip("torchvision is installed: the test above asks for the real processor")
    done = fresh([TINY, "Qwen3VLProcessor"], tmp_path, with_torchvision=False)
    assert (done.returncode == 1 and "ImportError" in done.stderr
            and "requires the Torchvision library" in done.stderr)


def test_a_processor_may_be_saved_where_it_came_from(tmp_path):
    model, processor = load_tiny()
    processor.save_pretrained(tmp_path)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    shutil.copy(TINY / "config.json", tmp_path)
    load_processor(str(tmp_path), 112 * 112).save_pretrained(tmp_path)
    assert before == {name: (tmp_path / name).read_bytes() for name in before}


# a folder that somebody else made

EVIL = "open({!r}, 'w').write('it ran')\nclass X: pass\n"


def change(folder, name, part=None, **values):
    content = json.loads((folder / name).read_text())
    (content[part] if part else content).update(values)
    (folder / name).write_text(json.dumps(content))


def weights(folder, work=lambda found: None, **metadata):
    found = load_file(folder / "model.safetensors")
    work(found)
    save_file(found, folder / "model.safetensors", metadata=metadata)


def sharded(folder, file):
    index = {"metadata": {}, "weight_map": {name: file for name in load_file(folder / "model.safetensors")}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    (folder / "model.safetensors").rename(folder.parent / "model.safetensors")


class RunsCode:
    def __init__(self, mark): self.mark = mark
    def __reduce__(self): return open, (self.mark, "w")


@pytest.fixture
def copy(tmp_path, monkeypatch):
    """A copy of the tiny model's folder, with code beside it that leaves a mark;
    nobody may be asked anything."""
    folder = shutil.copytree(TINY, tmp_path / "model")
    mark = tmp_path / "mark"
    for name in ("evil.py", "custom_generate/generate.py"):
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text(EVIL.format(str(mark)))
    def asked(*given): raise AssertionError("somebody was asked whether foreign code may run")
    monkeypatch.setattr("builtins.input", asked)
    yield folder
    assert not mark.exists(), "foreign code ran"


HARMLESS = {  # code is named and not needed
    "model code": lambda f: change(f, "config.json", auto_map={"AutoConfig": "evil.X",
                                                               "AutoModelForImageTextToText": "evil.X"}),
    "tokenizer code": lambda f: change(f, "tokenizer_config.json", tokenizer_class="Evil",
                                       auto_map={"AutoTokenizer": ["evil.X", "evil.X"]}),
    "processor code": lambda f: change(f, "processor_config.json", processor_class="Evil",
                                       auto_map={"AutoProcessor": "evil.X", "AutoImageProcessor": "evil.X"}),
    "image code": lambda f: change(f, "processor_config.json", "image_processor", image_processor_type="Evil",
                                   auto_map={"AutoImageProcessor": "evil.X"}),
    "text code": lambda f: change(f, "config.json", "text_config", auto_map={"AutoConfig": "evil.X"}),
    "generation code": lambda f: change(f, "generation_config.json", custom_generate="evil/evil"),
    "no metadata": weights}


@pytest.mark.parametrize("kind", HARMLESS)
def test_code_in_a_folder_is_left_alone_and_not_handed_on(kind, copy, tmp_path):
    HARMLESS[kind](copy)
    model, processor = load_vlm(str(copy))
    assert type(model).__module__.startswith("transformers.") and student_codec(str(copy)).name == "qwen3_vl"
    processor.save_pretrained(tmp_path / "out")
    for path in (tmp_path / "out").glob("*config.json"):
        assert "Evil" not in path.read_text() and "auto_map" not in path.read_text()


REFUSED = {
    "unknown type with code": (lambda f: change(f, "config.json",
                                                model_type="evil", auto_map={"AutoConfig": "evil.X"}),
                               "is a evil model: this package supports"),
    "no type": (lambda f: change(f, "config.json", model_type=None), "is a None model"),
    "two types": (lambda f: change(f, "config.json", model_type=["qwen3_vl"]), "this package supports"),
    "kernel": (lambda f: change(f, "config.json", attn_implementation="evil/kernel"),
               "asks for code or weights from elsewhere .attn_implementation is 'evil/kernel'"),
    "kernel below": (lambda f: change(f, "config.json", "text_config", _attn_implementation="evil/kernel"),
                     "asks for code or weights from elsewhere"),
    "other weights": (lambda f: change(f, "config.json", transformers_weights="pytorch_model.bin"),
                      "transformers_weights is 'pytorch_model.bin'"),
    "no JSON": (lambda f: (f / "config.json").write_text("{"), "config.json of .* is not a JSON object"),
    "a list": (lambda f: (f / "config.json").write_text("[1]"), "is not a JSON object"),
    "nested": (lambda f: (f / "config.json").write_text("[" * 200_000), "is not a JSON object"),
    "no text": (lambda f: (f / "config.json").write_bytes(b"\xff\xfe{}"), "is not a JSON object"),
    "adapter": (lambda f: (f / "adapter_config.json").write_text('{"base_model_name_or_path": "evil/base"}'),
                "holds a LoRA adapter, not a model"),
    "no tokenizer": (lambda f: (f / "tokenizer.json").unlink(), "has no tokenizer.json"),
    "broken tokenizer": (lambda f: (f / "tokenizer.json").write_text("{"),
                         "the tokenizer files of .* cannot be read"),
    "pickle": (lambda f: (torch.save({"a": torch.zeros(2)}, f / "pytorch_model.bin"),
                          (f / "model.safetensors").unlink()),
               r"are a pickle \(pytorch_model.bin\), which can run code"),
    "list of pickles": (lambda f: ((f / "pytorch_model.bin.index.json").write_text("{}"),
                                   (f / "model.safetensors").unlink()), "are a pickle"),
    "pickle by its name": (lambda f: (f / "model.safetensors").write_bytes(
        pickle.dumps(RunsCode(str(f.parent / "mark")))), "is broken or not a safetensors file"),
    "torch.save by its name": (lambda f: torch.save({"a": torch.zeros(2)}, f / "model.safetensors"),
                               "is broken or not a safetensors file"),
    "pickle in the index": (lambda f: (sharded(f, "pytorch_model.bin"), (f / "pytorch_model.bin")
                                       .write_bytes(pickle.dumps(RunsCode(str(f.parent / "mark"))))),
                            "names 'pytorch_model.bin': weights are read from safetensors"),
    "elsewhere in the index": (lambda f: sharded(f, "../model.safetensors"), "names '../model.safetensors'"),
    "numbers in the index": (lambda f: sharded(f, 7), "names 7"),
    "broken index": (lambda f: ((f / "model.safetensors.index.json").write_text("{"),
                                (f / "model.safetensors").unlink()), "index.json of .* is broken"),
    "half a file": (lambda f: (f / "model.safetensors").write_bytes(
        (f / "model.safetensors").read_bytes()[:1_000_000]), "is broken or not a safetensors file"),
    "endless header": (lambda f: (f / "model.safetensors").write_bytes(
        b"\xff" * 7 + b"\x3f" + (f / "model.safetensors").read_bytes()[8:]), "header too large"),
    "header of junk": (lambda f: (f / "model.safetensors").write_bytes(
        (100).to_bytes(8, "little") + b"x" * 5000), "is broken or not a safetensors file"),
    "Git LFS": (lambda f: (f / "model.safetensors")
                .write_text("version https://git-lfs.github.com/spec/v1\noid sha256:abc\nsize 12345\n"),
                "is broken or not a safetensors file"),
    "nothing": (lambda f: (f / "model.safetensors").write_bytes(b""), "is broken or not a safetensors file"),
    "weights missing": (lambda f: weights(f, lambda found: [found.pop(name) for name in list(found)[1:6]],
                                          format="pt"),
                        r"\d weights of a qwen3_vl model are missing from the files"),
    "other shape": (lambda f: weights(f, lambda found: found.update({next(iter(found)): torch.zeros(3, 5)}),
                                      format="pt"), "do not have the shapes that its config.json gives")}


@pytest.mark.parametrize("kind", REFUSED)
def test_what_cannot_be_read_safely_is_refused_in_one_sentence(kind, copy):
    spoil, message = REFUSED[kind]
    spoil(copy)
    with pytest.raises(ValueError, match=message) as refused: load_vlm(str(copy))
    assert ("trust_remote_code" not in str(refused.value) and "use_safetensors" not in str(refused.value)
            and "\n" not in str(refused.value).strip())


def test_a_folder_without_weights_is_not_there(copy):
    (copy / "model.safetensors").unlink()
    with pytest.raises(OSError): load_vlm(str(copy))


def test_the_guard_cannot_be_switched_off(copy):
    with pytest.raises(TypeError, match="trust_remote_code"): load_vlm(str(copy), trust_remote_code=True)
