import json
import os
import subprocess
import sys
import time
from contextlib import contextmanager
from pathlib import Path

import pytest

from conftest import ROOT
from faulty_server import body_hash
from rsground_nb.boxes import Codec, parse_completion
from rsground_nb.chat import PROMPT_VERSION, Server, chat_drafts, free_port, wait_for
from rsground_nb.data import to_dataset
from rsground_nb.scenes import scene_records

CODEC = Codec("qwen2_5_vl", 28, 56 * 56, 112 * 112)
ROWS = to_dataset(list(scene_records(12, 0)))


class Faulty:
    """A server that misbehaves by plan, in its own process; `log()` is what it was asked."""

    def __init__(self, folder, *faults, port=None):
        self.port, self.file = port or free_port(), Path(folder, "server.jsonl")
        out = Path(folder, "server.out")
        self.process = subprocess.Popen([sys.executable, str(ROOT / "tests" / "faulty_server.py"), str(self.port), str(self.file), *faults], stdin=subprocess.PIPE, stdout=out.open("w"), stderr=subprocess.STDOUT)
        wait_for(self.process, self.port, out, 30)

    def server(self, **settings): return Server(f"http://127.0.0.1:{self.port}/v1", "m", **{"max_retries": 2, "workers": 1, "timeout": 20, **settings})

    def log(self): return [json.loads(line) for line in self.file.read_text().splitlines()] if self.file.exists() else []

    def kill(self): self.process.kill(); self.process.communicate()


@pytest.fixture
def faulty(tmp_path):
    started = []
    def start(*faults, **kw):
        started.append(Faulty(tmp_path, *faults, **kw))
        return started[-1]
    yield start
    for s in started: s.kill()


@pytest.fixture(autouse=True)
def no_key(monkeypatch): monkeypatch.delenv("OPENAI_API_KEY", raising=False)


def draw(server, tmp_path, count=3, **kw): return chat_drafts(ROWS.select(range(count)), CODEC, server, tmp_path / "replies.sqlite", **kw)


def test_every_row_gets_its_own_box_in_order(faulty, tmp_path):
    s = faulty()
    drafts = draw(s.server(workers=4), tmp_path, 12)
    assert [parse_completion(d.completion).box for d in drafts] == [CODEC.encode(r["box"], r["width"], r["height"]) for r in ROWS]
    assert len(s.log()) == 12 and {d.details["prompt_version"] for d in drafts} == {PROMPT_VERSION}
    again = draw(s.server(), tmp_path, 12)
    assert [d.completion for d in again] == [d.completion for d in drafts] and all(d.details["cached"] for d in again)
    assert len(s.log()) == 12


@pytest.mark.parametrize("fault", ["429=1", "500", "503", "close", "cut", "slow=3"])
def test_what_passes_is_waited_for(faulty, tmp_path, fault):
    s = faulty(fault)
    drafts = draw(s.server(timeout=1), tmp_path)
    assert not any(d.trouble for d in drafts) and [x["retry"] for x in s.log()] == [0, 1, 0, 0]
    if fault == "429=1": assert s.log()[1]["time"] - s.log()[0]["time"] >= 1


@pytest.mark.parametrize("fault, said", [("500", "HTTP 500"), ("429=0.1", "429"), ("halfjson", "ends in the middle"), ("html", "not a chat completion"), ("nochoices", "not a chat completion"), ("abort", "broke off"),
                                         ("400", "400"), ("close", "no connection"), ("slow=3", "no reply within 1 s, asked once")])
def test_what_does_not_pass_is_told_and_not_remembered(faulty, tmp_path, fault, said):
    s = faulty(fault)
    drafts = draw(s.server(max_retries=0, timeout=1, structured=False), tmp_path)
    assert said in drafts[0].trouble and drafts[0].completion == "" and not drafts[1].trouble and not drafts[2].trouble
    assert not any(d.trouble for d in draw(s.server(structured=False), tmp_path))
    assert len(s.log()) == 4 and s.log()[3]["hash"] == s.log()[0]["hash"]


@pytest.mark.parametrize("fault, said", [("401", "OPENAI_API_KEY, which is set"), ("403", "refuses the key"), ("404", "no model 'm'")])
def test_what_no_row_can_get_over_stops_at_once(faulty, tmp_path, fault, said, monkeypatch, capfd):
    monkeypatch.setenv("OPENAI_API_KEY", "sk-very-secret")
    s = faulty("ok", f"always:{fault}")
    with pytest.raises(ValueError, match=said) as caught: draw(s.server(), tmp_path, 12)
    assert len(s.log()) == 2 and s.log()[0]["key"] == "sk-very-secret"
    shown = "".join(__import__("traceback").format_exception(caught.value)) + "".join(capfd.readouterr()) + repr(s.server())
    stored = b"".join(p.read_bytes() for p in tmp_path.glob("replies.sqlite*"))
    assert "very-secret" not in shown and b"very-secret" not in stored


def test_a_key_in_the_servers_words_is_left_out(faulty, tmp_path, monkeypatch):
    monkeypatch.setenv("MY_KEY", "sk-very-secret")
    trouble = draw(faulty("500").server(key_env="MY_KEY", max_retries=0), tmp_path, 1)[0].trouble
    assert "HTTP 500 for the key …" in trouble


def test_a_server_without_a_key_gets_a_dummy(faulty, tmp_path):
    s = faulty()
    draw(s.server(), tmp_path, 1)
    assert s.log()[0]["key"] == "none"


@pytest.mark.parametrize("structured, asked", [(None, [True, False, False, False]), (False, [False] * 3)])
def test_a_refused_format_is_done_without_and_remembered(faulty, tmp_path, structured, asked):
    s = faulty("always:noformat")
    drafts = draw(s.server(structured=structured), tmp_path)
    assert not any(d.trouble for d in drafts) and [x["format"] for x in s.log()] == asked
    assert all(d.details["cached"] for d in draw(s.server(), tmp_path)) and len(s.log()) == len(asked)


def test_a_demanded_format_is_not_given_up(faulty, tmp_path):
    s = faulty("always:noformat")
    assert all("400" in d.trouble for d in draw(s.server(structured=True), tmp_path)) and all(x["format"] for x in s.log())


def test_a_reply_cut_by_its_limit_is_kept_and_has_no_box(faulty, tmp_path):
    s = faulty("always:length")
    for cached in (False, True):
        d = draw(s.server(), tmp_path, 1)[0]
        assert d.details["finish_reason"] == "length" and d.details["cached"] == cached and parse_completion(d.completion).box is None
    assert len(s.log()) == 1


def test_an_empty_reply_is_trouble_and_paid_once(faulty, tmp_path):
    s = faulty("always:empty")
    for _ in range(2): assert "empty" in draw(s.server(), tmp_path, 1)[0].trouble
    assert len(s.log()) == 1


def test_tokens_are_estimated_where_the_server_does_not_count(faulty, tmp_path):
    d = draw(faulty("nousage").server(), tmp_path, 2)
    assert d[0].details["estimated"] and 150 < d[0].details["tokens"] < 600 and not d[1].details["estimated"] and d[1].details["tokens"] == 100


def test_a_budget_ends_the_asking_and_a_later_run_goes_on(faulty, tmp_path):
    s, got = faulty(), []
    for _ in range(4):
        with pytest.warns(UserWarning, match="not asked") if len(got) < 2 else contextmanager(lambda: (yield))(): drafts = draw(s.server(), tmp_path, 5, budget=150)
        got.append(sum(not d.trouble for d in drafts))
        assert all("budget of 150 tokens is spent" in d.trouble for d in drafts if d.trouble)
    assert got == [2, 4, 5, 5] and len(s.log()) == 5
