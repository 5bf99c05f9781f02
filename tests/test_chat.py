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
