"""What a data set, a prediction file or a hurried command must not be able to do. Bounds are on memory and on
lines executed, never on seconds."""
import json
import os
import re
import resource
import signal
import struct
import subprocess
import sys
import zlib
from contextlib import contextmanager

import nbformat
import pandas as pd
import pytest
import yaml
from PIL import Image

from conftest import ROOT, lines_run
from rsground_nb import run
from rsground_nb.boxes import Codec
from rsground_nb.cot import rule_drafts
from rsground_nb.data import load_folder, split_hash, to_dataset
from rsground_nb.files import read_rows
from rsground_nb.loading import load_processor
from rsground_nb.model import to_prompt
from rsground_nb.reading import Defect, open_pickle, plain_yaml, printable, read_image
from rsground_nb.run import main, new_run, save_run
from rsground_nb.scale import finish_stage, locked, stage_ready
from rsground_nb.synthesis import fill_in, synthesise


def within(megabytes, code, *words):
    """What a process printed that may take so many more MB than its imports."""
    limit = f"""
import resource, sys
from pathlib import Path
from rsground_nb.files import *
from rsground_nb.reading import *
now = int(open('/proc/self/statm').read().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (now + {megabytes} * 2 ** 20,) * 2)
"""
    done = subprocess.run([sys.executable, "-c", limit + code, *map(str, words)], capture_output=True,
                          text=True)
    assert done.returncode == 0, done.stderr[-600:]
    return done.stdout


# ---- small files, large harm

BOMBS = {  # what a pickle says, and what must come of it
    "memo index": (b"\x80\x02]r\x00\x00\x00\x08.", "[]"), "memo index in text": (b"(lp134217728\n.", "[]"),
    "the last index": (b"\x80\x02]r\xff\xff\xff\xff.", "[]"),
    "bytearray": (b"\x80\x05\x96" + struct.pack("<Q", 2 ** 33) + b".", "not a pickle"),
    "long text": (b"\x80\x04\x8d" + struct.pack("<Q", 2 ** 40) + b"a.", "not a pickle"),
    "long bytes": (b"\x80\x04\x8e" + struct.pack("<Q", 2 ** 40) + b"a.", "not a pickle"),
    "frame": (b"\x80\x04\x95" + struct.pack("<Q", 2 ** 40) + b"].", "[]")}


def test_a_pickle_takes_no_more_memory_than_its_size_allows(tmp_path):
    for name, (data, _) in BOMBS.items(): (tmp_path / f"{name}.p").write_bytes(data)
    said = within(100, """
for path in sorted(Path(sys.argv[1]).glob('*.p')):
    try: print(path.stem, '|', open_pickle(path))
    except Defect as e: print(path.stem, '|', e)
""", tmp_path)
    found = dict(line.split(" | ") for line in said.splitlines())
    for name, (_, expected) in BOMBS.items():
        assert expected in found[name] and "MemoryError" not in found[name], (name, found[name])


@pytest.mark.parametrize("data", [
    # a key of 2 ** 60 parts
    b"\x80\x02)q\x00" + b"".join(b"h" + bytes([k]) + b"h" + bytes([k]) + b"\x86q" + bytes([k + 1])
                                 for k in range(60)) + b"}h\x3cK\x01s.",
    b"\x80\x02)" + b"2\x86" * 60 + b"}q\x00K\x01s."])
def test_a_tuple_of_tuples_is_not_unfolded(tmp_path, data):
    (tmp_path / "a.p").write_bytes(data)
    def work():
        with pytest.raises(Defect): open_pickle(tmp_path / "a.p")
    assert lines_run(work) < 20_000


LAUGHS = "a: &a [x, x, x, x, x, x, x, x, x]\n" + "".join(f"{b}: &{b} [{', '.join(['*' + a] * 9)}]\n"
                                                         for a, b in zip("abcdefgh", "bcdefghi"))
MERGES = "a: &a {k: v}\n" + "".join(f"m{k}: &m{k}\n  <<: [{', '.join([f'*m{k - 1}' if k else '*a'] * 9)}]\n"
                                    for k in range(9))


@pytest.mark.parametrize("text, what",
                         [(LAUGHS, "aliases"), (MERGES, "merges"), ("a: {<<: {b: 1}}", "merges"),
                          ("a: &x 1\nb: *x", "line 2"), ("[" * 5000, "too deeply"),
                          ("{a: " * 5000, "too deeply"), ("- " * 5000 + "a", "too deeply")])
def test_yaml_with_aliases_or_merges_is_refused(tmp_path, text, what):
    def work():
        with pytest.raises(Defect, match=what): plain_yaml(text)
    assert lines_run(work) < 1_000_000
    for part in ("images/train", "labels/train"): (tmp_path / part).mkdir(parents=True)
    Image.new("RGB", (50, 40)).save(tmp_path / "images" / "train" / "a.jpg")
    (tmp_path / "labels" / "train" / "a.txt").write_text("0 0.5 0.5 0.1 0.1\n")
    (tmp_path / "data.yaml").write_text(f"names: [plane]\n{text}" if text[0] == "a" else text)
    _, rows, findings = read_rows(tmp_path)
    assert rows == [] and len(findings) == 1


def test_plain_yaml_is_read_as_before():
    for path in (ROOT / "rsground_nb" / "configs").rglob("*.yaml"):
        assert plain_yaml(path.read_text()) == yaml.safe_load(path.read_text()) != {}


# ---- bad pictures

def png(width, height, data=b""):
    def chunk(kind, body):
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))
    return (b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
            + chunk(b"IDAT", data) + chunk(b"IEND", b""))


def bad_pictures(folder):
    """A data set of one good picture and of many that are none, sizes declared; the names of the bad ones."""
    folder.mkdir()
    Image.new("RGB", (100, 80), "green").save(folder / "good.png")
    Image.new("RGB", (1300, 2)).save(folder / "long.png")
    Image.new("RGB", (100, 80)).save(folder / "whole.jpg")
    whole = (folder / "whole.jpg").read_bytes()
    (folder / "huge.png").write_bytes(png(60000, 60000))
    # pixels that are not there
    (folder / "large.png").write_bytes(png(3000, 3000, zlib.compress(b"\0" * 1000)))
    (folder / "flipped.jpg").write_bytes(whole[:40] + bytes([whole[40] ^ 255]) + whole[41:90] + whole[91:])
    (folder / "cut.jpg").write_bytes(whole[:-200])
    (folder / "text.jpg").write_text("no picture")
    (folder / "empty.jpg").touch()
    os.mkfifo(folder / "pipe.jpg")
    (folder / "self.jpg").symlink_to(folder / "self.jpg")
    (folder / "a").symlink_to(folder / "b"), (folder / "b").symlink_to(folder / "a")
    (folder / "folder.jpg").mkdir()
    names = ["good.png", "long.png", "huge.png", "large.png", "flipped.jpg", "cut.jpg", "text.jpg",
             "empty.jpg", "pipe.jpg", "self.jpg", "folder.jpg"]
    line = dict(expression="the pad", box=[10, 0, 30, 2], category="pad")
    rows = [dict(line, image=n, width=1300 if n == "long.png" else 100, height=2 if n == "long.png" else 80,
                 box=[10, 0, 30, 2]) for n in names]
    (folder / "train.jsonl").write_text(
        "".join(json.dumps(r) + "\n" for r in [*rows, dict(line, image="a/x.jpg", width=100, height=80)]))
    return names[2:]


def test_a_bad_picture_is_a_defect_by_name_and_takes_no_memory(tmp_path):
    bad = bad_pictures(tmp_path / "set")
    said = within(200, """
for name in sys.argv[2:]:
    try: print(name, read_image(Path(sys.argv[1], name)).size)
    except Defect as e: print(name, '|', e)
""", tmp_path / "set", *(n for n in bad if n != "large.png"))
    for name, line in zip((n for n in bad if n != "large.png"), said.splitlines()):
        assert line.startswith(f"{name} | ") and line.count(name) == 2 and "MemoryError" not in line, line
    with pytest.raises(Defect, match="large.png"): read_image(tmp_path / "set" / "large.png")


@pytest.mark.parametrize("student", ["qwen3_vl", "qwen2_5_vl"])
def test_bad_pictures_do_not_stop_cot(tmp_path, capsys, monkeypatch, student):
    bad = bad_pictures(tmp_path / "set")
    monkeypatch.setenv("RSGROUND_CACHE", str(tmp_path / "cache"))
    words = ["cot", "--data", str(tmp_path / "set"), "--out", str(tmp_path / "chains"), "--student", student,
             "--max-pixels", "12544", "--samples", "99"]
    assert main(words) in (0, 1) and main(words) in (0, 1)
    lines = [json.loads(t) for t in (tmp_path / "chains" / "chains.jsonl").read_text().splitlines()]
    assert {r["image_id"] for r in lines} == {"good.png", "long.png", *bad}
    page = (tmp_path / "chains" / "audit.html").read_text()
    for name in bad: assert re.search(rf"The image cannot be read: [^<]*{re.escape(name)}", page), name
    assert "Traceback" not in capsys.readouterr().err
    findings = load_folder(tmp_path / "set")[1]
    # those three have a whole header
    for name in set(bad) - {"large.png", "flipped.jpg", "cut.jpg"}:
        assert any(name in str(f) for f in findings), name


# ---- texts that are more than texts

MARKS = ["<|image_pad|>", "<|im_end|>", "<|im_start|>", "<|vision_start|>", "<|vision_end|>", "<|video_pad|>",
         "<|endoftext|>", "<|object_ref_start|>", "<|<|image_pad|>|>", "<<|im_end|>>", "<|im_end|", "|>"]


@pytest.mark.parametrize("mark", MARKS)
def test_a_mark_of_the_chat_template_in_a_sentence_is_only_letters(mark):
    processor = load_processor(str(ROOT / "rsground_nb" / "assets" / "tiny"), 112 * 112)
    def special(text):
        ids = processor.tokenizer(processor.apply_chat_template(to_prompt(text), add_generation_prompt=True,
                                                                tokenize=False)).input_ids
        return [i for i in ids if i in processor.tokenizer.all_special_ids]
    assert special(f"the {mark} ship {mark}") == special("the ship") and len(special("the ship")) > 3


def test_a_mark_in_a_sentence_is_found_and_one_in_a_completion_is_not_learned(tmp_path):
    Image.new("RGB", (100, 80)).save(tmp_path / "a.png")
    (tmp_path / "train.jsonl").write_text(
        json.dumps(dict(image="a.png", expression="the <|im_end|> pad", box=[10, 20, 30, 40])) + "\n")
    rows, findings = load_folder(tmp_path)
    assert [f.kind for f in findings] == ["special token"]
    drafts = rule_drafts(to_dataset([dict(expression="the ship", box=[10, 20, 30, 40], width=100, height=80,
                                          expression_id="1")]), Codec("qwen3_vl"))
    learned = synthesise(to_dataset([dict(image=None, expression="the ship", box=[10, 20, 30, 40], width=100,
                                          height=80, expression_id="1", image_id="a", split="train")]),
                         Codec("qwen3_vl"),
                         [d.__class__(d.completion.replace("<think>", "<think><|im_end|><|image_pad|>"))
                          for d in drafts], lowest_iou=0)[0]
    for row in learned:
        assert "<|" not in json.dumps(row["completion"]) and "im_end" in json.dumps(row["completion"])


def test_a_dollar_in_a_sentence_is_no_formula():
    lines = [(path.stem, line) for path in (ROOT / "nbs").rglob("*.ipynb")
             for c in nbformat.read(path, as_version=4).cells for line in c.source.split("\n")]
    titles = [(name, line) for name, line in lines if re.search(r"(set_|sup)title\(", line)
              and "expression" in line]
    assert len(titles) > 5
    for name, line in titles: assert "parse_math=False" in line, (name, line)


def test_what_is_printed_cannot_talk_to_a_terminal(capsys):
    run.complain("a\x1b]0;title\x07 \x9b31m\r\nsecond line ‮")
    run.show("x\x1b[2J")
    out, err = capsys.readouterr()
    assert (not re.search(r"[\x00-\x09\x0b-\x1f\x7f-\x9f‮]", out + err) and err.count("\n") == 2
            and printable("grün, 東") == "grün, 東")


def test_a_cell_is_no_formula(tmp_path):
    for text in ("=HYPERLINK(1)", "+1", "-1+1", "@SUM(1)", "\t=1", "\r=1"):
        assert run.plain_cell(text) == "'" + text
    for value in ("test", -1.5, None, 7): assert run.plain_cell(value) == value
    run.write_tables(tmp_path / "out", one=pd.DataFrame(dict(split=["=1+1"], mIoU=[-0.5])))
    assert (tmp_path / "out" / "one.csv").read_text().splitlines() == ["split,mIoU", "'=1+1,-0.5"]


def test_what_a_data_set_says_is_escaped_in_html():
    evil = "<script>alert(1)</script>"
    page = fill_in("audit.html", counts=[], cards={}, meaning={}, about={"split": evil}, total=1)
    assert evil not in page and "&lt;script&gt;" in page
    source = "\n".join(c.source
                       for c in nbformat.read(ROOT / "nbs" / "reference" / "run.ipynb", as_version=4).cells)
    assert re.findall(r"HTML\(f.*", source) == ['HTML(f"<p>{html.escape(verdict(stages))}</p>")']


def test_a_tab_or_a_line_break_in_a_sentence_makes_another_hash():
    def hashed(*rows):
        return split_hash(to_dataset([dict(image_id=i, box=b, expression=e) for i, b, e in rows]))
    box = (1, 2, 3, 4)
    assert hashed(("a", box, "x\nb\t1\t2\t3\t4\ty")) != hashed(("a", box, "x"), ("b", box, "y"))
    assert hashed(("a\t1", (2, 3, 4, 5), "x")) != hashed(("a", (1, 2, 3, 4), "5\tx"))
    texts = ["x", "x\t", "x\n", "x\\t", "x\\n", "x ", "\tx", "x\t\n", "x\n\t"]
    assert len({hashed(("a", box, t)) for t in texts}) == len(texts)


@pytest.mark.parametrize("folder", ["a{b}", "{}", "a}b"])
def test_braces_in_out_are_letters(tmp_path, monkeypatch, folder):
    import papermill
    from papermill.parameterize import parameterize_path
    asked = []
    monkeypatch.setattr(papermill, "execute_notebook", lambda source, target, **kw: asked.append(
        (parameterize_path(source, {}), parameterize_path(target, {}))))
    run.run_chapter("reference/scale", tmp_path / folder / "x.ipynb", scale="smoke")
    assert asked == [(str(run.notebooks_folder() / "reference/scale.ipynb"),
                      str(tmp_path / folder / "x.ipynb"))]


# ---- nothing half-written

@contextmanager
def small_files(size):
    """No file may grow beyond so many bytes: what a full disk looks like."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    before = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try: yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        signal.signal(signal.SIGXFSZ, before)


@contextmanager
def nobody_reads(monkeypatch):
    read, write = os.pipe()
    os.close(read)
    with monkeypatch.context() as patch, os.fdopen(write, "w") as out:
        patch.setattr(sys, "stdout", out)
        yield


@pytest.fixture
def predicted(tmp_path):
    """(folder, prediction file) of 60 rows."""
    folder = tmp_path / "set"
    folder.mkdir()
    Image.new("RGB", (100, 80)).save(folder / "a.png")
    lines = [dict(image="a.png", image_id=f"{k}.png", expression=f"the pad number {k}", expression_id=str(k),
                  box=[k, 20, 30 + k, 40], split="test") for k in range(60)]
    (folder / "train.jsonl").write_text("".join(json.dumps(r) + "\n" for r in lines))
    (tmp_path / "p.jsonl").write_text(
        "".join(json.dumps(dict(expression_id=r["expression_id"], predicted=r["box"])) + "\n" for r in lines))
    return folder, tmp_path / "p.jsonl"


def test_a_full_disk_leaves_nothing_and_the_same_command_works_afterwards(tmp_path, predicted, capsys):
    folder, file = predicted
    (tmp_path / "out").mkdir()
    for words, out in ((["data", "split", folder], "out/new.jsonl"),
                       (["data", "doctor", folder, "--manifest"], "out/good.jsonl"),
                       (["evaluate", file, "--data", folder, "--out"], "out/scores")):
        words = [*map(str, words), str(tmp_path / out)]
        with small_files(500): assert main(words) == 2
        said = capsys.readouterr().err
        assert (said.startswith("rsground: ") and "File too large" in said and str(tmp_path / "out") in said
                and said.count("\n") == 1)
        assert list((tmp_path / "out").iterdir()) == []
        assert main(words) in (0, 1) and (tmp_path / out).exists()
        if (tmp_path / out).is_dir(): assert sorted(os.listdir(tmp_path / out)) == ["modes.csv", "strata.csv"]
        for path in (tmp_path / "out").iterdir():
            path.unlink() if path.is_file() else [p.unlink() for p in path.iterdir()] and path.rmdir()


def test_a_reader_that_hangs_up_costs_no_result(tmp_path, predicted, monkeypatch, capsys):
    folder, file = predicted
    for words, out in ((["data", "split", folder], "new.jsonl"),
                       (["data", "doctor", folder, "--manifest"], "good.jsonl"),
                       (["evaluate", file, "--data", folder, "--out"], "scores")):
        with nobody_reads(monkeypatch): assert main([*map(str, words), str(tmp_path / out)]) == 141
        assert (tmp_path / out).exists() and "Traceback" not in capsys.readouterr().err
    assert (len((tmp_path / "new.jsonl").read_text().splitlines()) == 60
            and sorted(os.listdir(tmp_path / "scores")) == ["modes.csv", "strata.csv"])


def test_a_damaged_slip_is_said(tmp_path):
    for text in ("", "{", "[1]", "null", '{"scale": '):
        (tmp_path / "made_by.json").write_text(text)
        with pytest.raises(ValueError, match="made_by.json is damaged"): stage_ready(tmp_path, scale="smoke")
    finish_stage(tmp_path, scale="smoke")
    assert stage_ready(tmp_path, scale="smoke") and os.listdir(tmp_path) == ["made_by.json"]


# ---- whose run it is

@pytest.fixture
def begun(tmp_path, monkeypatch):
    """The folder of a run without a finished chapter in runs/, and nothing that takes long."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(run, "run_chapters", lambda run, say: say(f"chapters of {run['out']}"))
    new_run("runs/one", "smoke", 0, "scenes")
    return tmp_path / "runs" / "one"


def test_a_run_has_one_worker_and_a_dead_one_holds_nothing(begun, capsys):
    with locked(begun): assert main(["run", "--resume", "--out", str(begun)]) == 2
    assert "in use by another process" in capsys.readouterr().err
    dead = subprocess.run([sys.executable, "-c", "import os; from rsground_nb.scale import locked\nwith "
                           f"locked({str(begun)!r}): os.kill(os.getpid(), 9)"])
    assert dead.returncode == -9 and main(["run", "--resume", "--out", str(begun)]) == 0
    with pytest.raises(KeyError), locked(begun): raise KeyError
    assert main(["run", "--resume"]) == 0


def test_a_moved_run_goes_on_where_it_is_now(begun, capsys):
    new = begun.rename(begun.parent / "two")
    assert main(["run", "--resume"]) == 0
    said = capsys.readouterr().out
    assert f"resumed: folder was {begun}, is {new}" in said and f"chapters of {new}" in said
    assert json.loads((new / "run.json").read_text())["out"] == str(new) and not begun.exists()
    assert main(["run", "--resume"]) == 0 and "resumed" not in capsys.readouterr().out


def test_another_commit_or_version_is_said_and_kept(begun, capsys):
    slip = json.loads((begun / "run.json").read_text())
    save_run(begun, {**slip, "commit": "abc", "versions": {**slip["versions"], "trl": "0.1"},
                     "python": "3.1"})
    assert main(["run", "--resume", "--out", str(begun)]) == 0
    said = capsys.readouterr().out
    for what in ("commit was abc", "trl was 0.1", "python was 3.1"): assert f"resumed: {what}, is " in said
    assert len(json.loads((begun / "run.json").read_text())["resumed"]) == 3


@pytest.mark.parametrize("text", ["", "{", "[]", "null", "{}", '{"scale": "smoke"}', "[" * 100_000])
def test_a_damaged_run_is_named_and_does_not_stand_in_the_way(begun, capsys, text):
    other = begun.parent / "other"
    other.mkdir()
    (other / "run.json").write_text(text)
    os.utime(begun / "run.json", (1, 1))  # so that the other one is looked at first
    assert main(["run", "--resume"]) == 0
    out, err = capsys.readouterr()
    assert "other/run.json is damaged" in err and "skipped" in err and f"chapters of {begun}" in out
    assert main(["run", "--resume", "--out", str(other)]) == 2 and "is damaged" in capsys.readouterr().err
    assert (other / "run.json").read_text() == text


# ---- which option a number belongs to

@pytest.mark.parametrize("words, message", [
    ("cot --out x --max-pixels 3", "--max-pixels 3: at least 3136"),
    ("cot --out x --seed -1", "--seed -1: at least 0"),
    ("cot --out x --seed 9999999999", "--seed 9999999999: at most 4294967295"),
    ("cot --out x --workers 0", "--workers 0: at least 1"),
    ("cot --out x --lowest-iou nan", "--lowest-iou nan"),
    ("run --seed 9999999999", "--seed 9999999999: at most"), ("run --seed -2", "--seed -2: at least 0"),
    ("evaluate p.jsonl --data nowhere --seed -1", "--seed -1"),
    ("data split nowhere x.jsonl --seed -1", "--seed -1"),
    ("evaluate p.jsonl --data nowhere --seed 1.5", "argument --seed"),
    ("cot --out x --limit ten", "argument --limit"),
    ("cot --out x --teacher chat --url http://a/v1 --model m --settings {\"tpo_p\":1}", "max_tokens"),
    ("cot --out x --setting 1", "unrecognized arguments: --setting")])
def test_a_number_is_refused_with_its_option(tmp_path, monkeypatch, capsys, words, message):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(run, "student_of", lambda args: pytest.fail("something slow was begun"))
    try: code = main(words.split())
    except SystemExit as stop: code = stop.code
    said = capsys.readouterr().err
    assert code == 2 and message in said and said.count("\n") == 1 and os.listdir(tmp_path) == [], said
