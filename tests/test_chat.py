import base64
import hashlib
import io
import json
import os
import re
import signal
import sqlite3
import subprocess
import sys
import threading
import time
import traceback
import tracemalloc
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path

import pytest
from datasets import Image
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image as PILImage

from benchmark_chat import kill_test
from conftest import ROOT
from faulty_server import free_port, wait_for
from rsground_nb.boxes import Codec, parse_completion
from rsground_nb.chat import (MOST_BYTES, MOST_LETTERS, PROMPT_VERSION, TEMPLATE, Client, Reply, ReplyCache,
                              Server, chat_drafts, content_key, cost_table, data_url, in_threads,
                              json_objects, make_question, read_reply, said_in, without_secrets, write_prompt)
from rsground_nb.data import to_dataset
from rsground_nb.run import main
from rsground_nb.scenes import scene_records

CODEC = Codec("qwen2_5_vl", 28, 56 * 56, 112 * 112)
ROWS = to_dataset(list(scene_records(12, 0)))


class Faulty:
    """A server that misbehaves by plan, in its own process; `log()` is what it was asked."""

    def __init__(self, folder, *faults, port=None):
        self.port, self.file = port or free_port(), Path(folder, "server.jsonl")
        out = Path(folder, "server.out")
        self.process = subprocess.Popen([sys.executable, str(ROOT / "tests" / "faulty_server.py"),
                                         str(self.port), str(self.file), *faults], stdin=subprocess.PIPE,
                                        stdout=out.open("w"), stderr=subprocess.STDOUT)
        wait_for(self.process, self.port, out, 30)

    def server(self, **settings):
        return Server(f"http://127.0.0.1:{self.port}/v1", "m",
                      **{"max_retries": 2, "workers": 1, "timeout": 20, "free_text": True, **settings})

    def log(self):
        return [json.loads(line) for line in self.file.read_text().splitlines()] if self.file.exists() else []

    def sent(self): return [int(line) for line in Path(f"{self.file}.sent").read_text().split()]

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


def draw(server, tmp_path, count=3, **kw):
    return chat_drafts(ROWS.select(range(count)), CODEC, server, tmp_path / "replies.sqlite", **kw)


def test_every_row_gets_its_own_box_in_order(faulty, tmp_path):
    s = faulty()
    drafts = draw(s.server(workers=4), tmp_path, 12)
    assert [parse_completion(d.completion).box for d in drafts] == [
        CODEC.encode(r["box"], r["width"], r["height"]) for r in ROWS]
    assert len(s.log()) == 12 and {d.details["prompt_version"] for d in drafts} == {PROMPT_VERSION}
    again = draw(s.server(), tmp_path, 12)
    assert ([d.completion for d in again] == [d.completion for d in drafts]
            and all(d.details["cached"] for d in again))
    assert len(s.log()) == 12


@pytest.mark.parametrize("fault", ["429=1", "500", "503", "close", "cut", "slow=3"])
def test_what_passes_is_waited_for(faulty, tmp_path, fault):
    s = faulty(fault)
    drafts = draw(s.server(timeout=1, structured=False), tmp_path)
    assert not any(d.trouble for d in drafts) and [x["retry"] for x in s.log()] == [0, 1, 0, 0]
    if fault == "429=1": assert s.log()[1]["time"] - s.log()[0]["time"] >= 1


@pytest.mark.parametrize("fault, said", [
    ("500", "HTTP 500"), ("429=0.1", "429"), ("halfjson", "ends in the middle"),
    ("html", "not JSON: <html>Please log in"), ("nochoices", "answers with an error: upstream is busy"),
    ("oddchoices", "not a chat completion"), ("abort", "broke off"),
    ("400", "400"), ("close", "no connection"), ("slow=3", "no whole reply within 1 s, asked once")])
def test_what_does_not_pass_is_told_and_not_remembered(faulty, tmp_path, fault, said):
    s = faulty(fault)
    drafts = draw(s.server(max_retries=0, timeout=1, structured=False), tmp_path)
    assert (said in drafts[0].trouble and drafts[0].completion == "" and not drafts[1].trouble
            and not drafts[2].trouble)
    assert not any(d.trouble for d in draw(s.server(structured=False), tmp_path))
    assert len(s.log()) == 4 and s.log()[3]["hash"] == s.log()[0]["hash"]


@pytest.mark.parametrize("fault, said", [("401", "OPENAI_API_KEY, which is set"), ("403", "refuses the key"),
                                         ("404", "no model 'm'")])
def test_what_no_row_can_get_over_stops_at_once(faulty, tmp_path, fault, said, monkeypatch, capfd):
    monkeypatch.setenv("OPENAI_API_KEY", "sk-very-secret")
    s = faulty("ok", f"always:{fault}")
    with pytest.raises(ValueError, match=said) as caught: draw(s.server(), tmp_path, 12)
    assert len(s.log()) == 2 and s.log()[0]["key"] == "sk-very-secret"
    shown = "".join(traceback.format_exception(caught.value)) + "".join(capfd.readouterr()) + repr(s.server())
    stored = b"".join(p.read_bytes() for p in tmp_path.glob("replies.sqlite*"))
    assert "very-secret" not in shown and b"very-secret" not in stored


ECHOES = ["500", "raw=KEY is not JSON", 'raw={"error": {"message": "KEY"}}',
          'raw={"detail": [{"loc": ["KEY"], "msg": "KEY", "KEY": 1}]}', 'raw={"error": {"KEY": "KEY"}}',
          'at=choices.0.finish_reason:"KEY"', 'at=choices.0.error:{"message": "KEY"}',
          'at=choices.0.message.content:"{\\"reasoning\\": \\"KEY\\", \\"box\\": [1, 2, 3, 4]}"',
          'at=choices.0.message.content:["<think>KEY</think>", {"type": "text", "text": "<answer>[1, '
          '2, 3, 4]</answer>"}]',
          *('at=choices.0.message.content:'
            + json.dumps('{"reasoning": "%s", "box": [1, 2, 3, 4]}'
                         % "sk-very-secret-and-long".replace("-", dash).replace("s", s))
            for dash, s in (("\\u002d", "s"), ("-", "\\u0073"), ("\\u002D", "\\u0073"))),
          'at=choices.0.message.refusal:"KEY"', "raw=" + "x" * 60 + " KEY"]


@pytest.mark.parametrize("echo", ECHOES)
def test_a_key_that_the_server_echoes_is_written_nowhere(faulty, tmp_path, monkeypatch, echo):
    monkeypatch.setenv("MY_KEY", "sk-very-secret-and-long")
    server = faulty(echo).server(key_env="MY_KEY", max_retries=0, structured=False)
    for _ in range(2): drafts = draw(server, tmp_path, 1)
    assert not echo.startswith("at=choices.0.message.content") or "…" in drafts[0].completion
    left = repr(drafts).encode() + b"".join(p.read_bytes() for p in tmp_path.glob("replies.sqlite*"))
    assert b"sk-very" not in left and b"and-long" not in left and drafts[0].completion + drafts[0].trouble


@pytest.mark.parametrize("name", ["messages", "stream", "model", "response_format"])
def test_a_field_that_is_not_for_more_is_refused(name):
    with pytest.raises(ValueError, match=f"more: '{name}'"):
        Server("http://h/v1", "m", more={name: True, "top_p": 1})


def test_the_stand_in_for_a_key_is_not_masked(faulty, tmp_path, monkeypatch):
    monkeypatch.setenv("MY_KEY", "e")
    assert "The sentence names one thing" in draw(faulty().server(key_env="MY_KEY"), tmp_path,
                                                  1)[0].completion


def test_a_server_without_a_key_gets_a_dummy(faulty, tmp_path):
    s = faulty()
    draw(s.server(), tmp_path, 1)
    assert s.log()[0]["key"] == "none"


SCHEMA, OBJECT, TEXT = KINDS = "json_schema", "json_object", "text"


def asked_for(server): return [x["kind"] for x in server.log()]


@pytest.mark.parametrize("status", [400, 415, 422, 500, 501])
@pytest.mark.parametrize("works, asked", [(SCHEMA, [SCHEMA] * 3), (OBJECT, [SCHEMA, OBJECT, OBJECT, OBJECT]),
                                          (TEXT, [SCHEMA, OBJECT, TEXT, TEXT, TEXT])])
def test_a_kind_of_reply_that_breaks_the_server_is_done_without_and_remembered(faulty, tmp_path, status,
                                                                               works, asked):
    s = faulty(f"always:unless_{works}={status}")
    assert not any(d.trouble for d in draw(s.server(), tmp_path)) and asked_for(s) == asked
    assert all(d.details["cached"] for d in draw(s.server(), tmp_path)) and len(s.log()) == len(asked)


@pytest.mark.parametrize("structured, kind", [(True, SCHEMA), (False, TEXT)])
def test_a_demanded_kind_is_not_given_up(faulty, tmp_path, structured, kind):
    s = faulty("always:unless_json_object=400")
    assert (all("HTTP 400: no " in d.trouble for d in draw(s.server(structured=structured), tmp_path))
            and asked_for(s) == [kind] * 3)


def test_a_kind_that_has_worked_is_kept_when_the_server_stumbles(faulty, tmp_path):
    s = faulty("ok", "500", "ok", "400")
    drafts = draw(s.server(), tmp_path, 4)
    assert set(asked_for(s)) == {SCHEMA} and [bool(d.trouble) for d in drafts] == [False, False, True, False]


def test_a_reply_cut_by_its_limit_is_kept_and_has_no_box(faulty, tmp_path):
    s = faulty("always:length")
    for cached in (False, True):
        d = draw(s.server(), tmp_path, 1)[0]
        assert (d.details["finish_reason"] == "length" and d.details["cached"] == cached
                and parse_completion(d.completion).box is None)
    assert len(s.log()) == 1


def test_an_empty_reply_is_trouble_and_paid_once(faulty, tmp_path):
    s = faulty("always:empty")
    for _ in range(2):
        assert (draw(s.server(), tmp_path, 1)[0].trouble == f"row {ROWS[0]['expression_id']!r}: the reply is "
                "empty (finish_reason stop)")
    assert len(s.log()) == 1


def test_thoughts_that_use_up_the_limit_are_told(faulty, tmp_path):
    s = faulty("always:thinks")
    for _ in range(2):
        assert ("the reply is empty (finish_reason length: it wrote only reasoning) "
                "(max_tokens is too small)" in draw(s.server(), tmp_path, 1)[0].trouble)
    assert len(s.log()) == 1


def test_a_refusal_is_passed_on_in_its_words(faulty, tmp_path):
    d = draw(faulty("refusal").server(), tmp_path, 1)[0]
    assert d.completion == "I will not look at this." and not d.trouble


def test_half_a_surrogate_pair_in_an_error_can_be_stored(faulty, tmp_path):
    d = draw(faulty("500=surrogate").server(max_retries=0, structured=False), tmp_path, 1)[0]
    assert "HTTP 500" in d.trouble and d.trouble.encode()


def test_half_a_surrogate_pair_can_be_stored(faulty, tmp_path):
    s = faulty("surrogate")
    for _ in range(2):
        assert draw(s.server(), tmp_path, 1)[0].completion == "<think>?</think><answer>[1, 2, 3, 4]</answer>"
    assert len(s.log()) == 1


NO_COUNTS = ["null", "[]", '["many"]', '"90"', "{}", '{"prompt_tokens": null}',
             '{"prompt_tokens": 0, "completion_tokens": 5}', '{"prompt_tokens": -1, "completion_tokens": 2}',
             '{"prompt_tokens": 90, "completion_tokens": -10}', '{"prompt_tokens": 1e30}',
             '{"prompt_tokens": NaN}',
             '{"prompt_tokens": 90, "completion_tokens": NaN}', '{"prompt_tokens": Infinity}',
             '{"prompt_tokens": "90"}', '{"prompt_tokens": [90]}', '{"prompt_tokens": true}',
             '{"prompt_tokens": 1000000001}', '{"prompt_tokens": 90, "completion_tokens": "10"}']


def test_tokens_are_estimated_where_the_server_does_not_count_or_counts_what_cannot_be(faulty, tmp_path):
    d = draw(faulty("nousage", *(f"at=usage:{n}" for n in NO_COUNTS[:10])).server(), tmp_path, 12)
    d += chat_drafts(ROWS, CODEC, faulty(*(f"at=usage:{n}" for n in NO_COUNTS[10:])).server(seed=1),
                     tmp_path / "replies.sqlite")
    estimated = [x.details["estimated"] for x in d]
    assert (estimated == [True] * 11 + [False] + [True] * 8 + [False] * 4
            and all(150 < x.details["tokens"] < 600 for x in d if x.details["estimated"])
            and d[11].details["tokens"] == 100)


def test_a_number_of_tokens_below_nothing_does_not_stretch_the_budget(faulty, tmp_path):
    s = faulty('always:at=usage:{"prompt_tokens": 10, "completion_tokens": -1000}')
    with pytest.warns(UserWarning, match="budget of 100 tokens is spent"):
        draw(s.server(), tmp_path, 5, budget=100)
    assert len(s.log()) == 1


@pytest.mark.parametrize("fault", ["drip", "slowheader"])
def test_the_timeout_is_for_the_whole_reply(faulty, tmp_path, fault):
    """A part every 0.1 s, 2,000 of them: the client hangs up after 10 or so, not after 2,000."""
    s = faulty(fault, "ok")
    assert "no whole reply within 1 s, asked once" in draw(s.server(timeout=1, max_retries=0), tmp_path,
                                                           1)[0].trouble
    wait_until(lambda: Path(f"{s.file}.sent").exists())
    assert s.sent()[0] < 200


@pytest.mark.parametrize("fault, said", [
    ("endless", f"longer than {MOST_BYTES} bytes"), ("bomb", f"longer than {MOST_BYTES} bytes"),
    ("packed=br", "packed as 'br', which was not requested"), ("packed=gzip, gzip", "packed as 'gzip, gzip'"),
    ("deep", "not JSON: [[["), ("at=choices.0.message.content:" + "[" * 900 + "]" * 900, "not a text"),
    ("raw=" + '{"error":' * 900 + "1" + "}" * 900, "an error"), ("raw=" + "9" * 5000, "not JSON")])
def test_a_reply_is_bounded_in_bytes_and_in_depth(faulty, tmp_path, fault, said):
    s = faulty(fault)
    tracemalloc.start()
    try:
        drafts = draw(s.server(), tmp_path)
        assert tracemalloc.get_traced_memory()[1] < 10 * MOST_BYTES
    finally: tracemalloc.stop()
    assert (said in drafts[0].trouble and len(drafts[0].trouble) < 300 and not drafts[1].trouble
            and len(s.log()) == 3)
    if fault == "endless": assert s.sent()[0] * 65536 < 8 * MOST_BYTES


def test_a_packed_reply_is_read(faulty, tmp_path):
    assert not draw(faulty("packed").server(), tmp_path, 1)[0].trouble


def test_a_redirect_is_not_followed(faulty, tmp_path):
    s = faulty("always:redirect")
    with pytest.raises(ValueError, match=r"to another address \(HTTP 307\), which is not followed"):
        draw(s.server(), tmp_path)
    assert len(s.log()) == 1


def test_an_overlong_text_is_trouble_and_paid_once(faulty, tmp_path):
    s = faulty("always:at=choices.0.message.content:" + json.dumps("{" * (MOST_LETTERS + 1)))
    for _ in range(2):
        assert f"longer than {MOST_LETTERS} letters" in draw(s.server(), tmp_path, 1)[0].trouble
    assert len(s.log()) == 1


@pytest.mark.parametrize("piece", ['{"a":', '{"a":[', '{"', '{"reasoning": "',
                                   '[{"box": [1, 2], "reasoning": "x", "y": ', '{"a": 1, '])
def test_half_open_json_is_given_up_in_linear_time(piece):
    """Counted in the characters that the decoder goes over, by the length of what it is given."""
    class Counted(json.JSONDecoder):
        gone_over = 0
        def raw_decode(self, text, start=0):
            try: return super().raw_decode(text, start)
            except json.JSONDecodeError as e: Counted.gone_over += e.pos - start; raise
            except RecursionError: Counted.gone_over += 1000 * len(piece); raise
    text = piece * (MOST_LETTERS // len(piece))
    with pytest.MonkeyPatch.context() as m:
        m.setattr(json, "JSONDecoder", Counted)
        assert list(json_objects(text)) == [] and Counted.gone_over < 25 * len(text)


@pytest.mark.parametrize("error, said", [
    ("busy", "busy"), ({"error": {"message": "Provider returned error", "code": 502}},
                       "Provider returned error"), ({"error": "model not loaded"}, "model not loaded"),
    ({"message": "no", "object": "error"}, "no"), ({"detail": "Not Found"}, "Not Found"),
    ({"detail": [{"loc": ["body", "messages", 0], "msg": "field required"}, {"loc": ["body"], "msg": "b"}]},
     "body.messages.0: field required; body: b"),
    ({"code": 7, "why": "x"}, "an error with the fields code, why"), (None, "None"), ([[[[[[1]]]]]], "…"),
    ({"loc": 3, "msg": [2]}, "2")])
def test_the_words_of_an_error(error, said): assert said_in(error) == said


def test_a_budget_ends_the_asking_and_a_later_run_goes_on(faulty, tmp_path):
    s, got = faulty(), []
    for _ in range(4):
        with pytest.warns(UserWarning, match="not asked") if len(got) < 2 else nullcontext():
            drafts = draw(s.server(), tmp_path, 5, budget=150)
        got.append(sum(not d.trouble for d in drafts))
        assert all("budget of 150 tokens is spent" in d.trouble for d in drafts if d.trouble)
    assert got == [2, 4, 5, 5] and len(s.log()) == 5


def test_nobody_at_the_address_is_said_at_once(tmp_path):
    with pytest.raises(ValueError, match="no connection to .*: is the server running"):
        draw(Server(f"http://127.0.0.1:{free_port()}/v1", "m"), tmp_path, 12)
    with pytest.raises(ValueError, match="no connection to http://no-such-host.invalid/v1"):
        draw(Server("http://no-such-host.invalid/v1", "m"), tmp_path, 12)


@pytest.mark.parametrize("fault", ["close", "401", "500", "drip"])
def test_a_probe_is_content_with_any_sign_of_life(faulty, fault):
    Client(faulty(f"probe:{fault}").server()).probe()


def test_a_finished_folder_needs_no_server(faulty, tmp_path):
    s = faulty()
    draw(s.server(), tmp_path)
    s.kill()
    assert all(d.details["cached"] for d in draw(s.server(), tmp_path))


def test_a_server_that_dies_is_given_up_and_the_next_run_goes_on(faulty, tmp_path):
    s = faulty("ok", "always:close")
    with pytest.warns(UserWarning,
                      match="rows were not asked: . consecutive rows got no answer.*run it again") as told:
        drafts = draw(s.server(max_retries=0, workers=2, max_failures=3), tmp_path, 12)
    failed = [d for d in drafts if d.trouble.startswith("no connection")]
    assert (3 <= len(failed) <= 5 and cost_table(drafts).iloc[0][["asked", "failed", "not_asked"]].tolist()
            == [1, len(failed), 11 - len(failed)])
    assert f"{11 - len(failed)} of 12 rows" in str(told[0].message)
    s.kill()
    assert not any(d.trouble for d in draw(faulty().server(), tmp_path, 12))


def wait_until(ready, seconds=60):
    until = time.monotonic() + seconds
    while not ready():
        assert time.monotonic() < until, "waited in vain"
        time.sleep(0.02)


def test_a_server_that_dies_and_comes_back_is_waited_for(faulty, tmp_path):
    s, got = faulty("ok", "ok", "always:slow=60"), []
    asking = threading.Thread(target=lambda: got.extend(draw(s.server(max_retries=6, timeout=50), tmp_path,
                                                             5)), daemon=True)
    asking.start()
    wait_until(lambda: len(s.log()) == 3)
    s.kill()
    faulty(port=s.port)
    asking.join(60)
    assert len(got) == 5 and not any(d.trouble for d in got)
    log = s.log()
    assert len(log) == 6 and len({x["hash"] for x in log}) == 5 and log[2]["hash"] == log[3]["hash"]


def test_rows_with_the_same_content_are_asked_once(faulty, tmp_path):
    s, rows = faulty("slow=1", "slow=1"), ROWS.select([0, 0, 1, 0, 1])
    drafts = chat_drafts(rows, CODEC, s.server(workers=4), tmp_path / "c.sqlite")
    assert (len(s.log()) == 2 and drafts[0].completion == drafts[1].completion == drafts[3].completion
            != drafts[2].completion == drafts[4].completion)
    assert [d.details["cached"] for d in drafts] == [False, True, False, True, True]
    assert cost_table(drafts).iloc[0].to_dict() == dict(rows=5, cached=3, asked=2, failed=0, not_asked=0,
                                                        tokens=200, estimated=False)


def test_rows_with_the_same_content_fail_together(faulty, tmp_path):
    s = faulty("always:500")
    drafts = chat_drafts(ROWS.select([0, 0, 1, 0, 1]), CODEC,
                         s.server(workers=4, max_retries=0, structured=False), tmp_path / "c.sqlite")
    assert (len(s.log()) == 2 and all("HTTP 500" in d.trouble for d in drafts)
            and cost_table(drafts).iloc[0]["failed"] == 5)


def test_two_clients_share_a_cache(faulty, tmp_path):
    s, got = faulty(), {}
    def ask_all(k): got[k] = draw(s.server(workers=3), tmp_path, 12)
    clients = [threading.Thread(target=ask_all, args=(k,), daemon=True) for k in range(3)]
    for c in clients: c.start()
    for c in clients: c.join(60)
    assert (len(got) == 3 and len({tuple(d.completion for d in drafts) for drafts in got.values()}) == 1
            and not any(d.trouble for d in got[0]))
    again = draw(s.server(), tmp_path, 12)
    assert all(d.details["cached"] for d in again)


def test_a_limit_counts_requests(faulty, tmp_path):
    s = faulty()
    with pytest.warns(UserWarning, match="limit of 2 requests"):
        draw(s.server(workers=4), tmp_path, 5, limit=2)
    assert len(s.log()) == 2 and not any(d.trouble for d in draw(s.server(), tmp_path, 5, limit=3))


def test_a_broken_image_costs_its_own_row_only(faulty, tmp_path):
    records = list(scene_records(4, 0))
    records[1]["image"], records[2]["image"] = ({"bytes": b"not a picture", "path": None},
                                                {"bytes": None, "path": str(tmp_path / "gone.png")})
    s = faulty()
    drafts = chat_drafts(to_dataset(records), CODEC, s.server(max_failures=1), tmp_path / "c.sqlite")
    assert ([bool(d.trouble) for d in drafts] == [False, True, True, False]
            and "gone.png" in drafts[2].trouble and len(s.log()) == 2)


def test_ctrl_c_leaves_at_once_and_keeps_what_came(faulty, tmp_path):
    s = faulty("ok", "ok", "always:slow=300")
    program = ("from test_chat import *; signal.signal(signal.SIGINT, signal.default_int_handler); "
               f"draw(Server('http://127.0.0.1:{s.port}/v1', 'm', workers=3, timeout=300, free_text=True), "
               f"Path({str(tmp_path)!r}), 12)")
    process = subprocess.Popen([sys.executable, "-c", program], cwd=ROOT / "tests", stdout=subprocess.PIPE,
                               stderr=subprocess.STDOUT, env={**os.environ, "PYTHONPATH": str(ROOT)})
    try:
        wait_until(lambda: len(s.log()) == 5)
        process.send_signal(signal.SIGINT)
        said = process.communicate(timeout=60)[0].decode()
    finally: process.kill()
    assert process.returncode != 0 and "KeyboardInterrupt" in said
    with pytest.warns(UserWarning): drafts = draw(s.server(), tmp_path, 12, limit=0)
    assert sum(not d.trouble for d in drafts) == 2


def test_jobs_are_taken_when_a_thread_is_free():
    taken, done = [], 0
    def jobs():
        for k in range(50): taken.append(k); yield k
    for k, result in in_threads(lambda k: k * k, jobs(), 4):
        done += 1
        assert result == k * k and len(taken) - done < 4
    assert done == 50


def picture_size(row, codec):
    url = data_url(make_question(row, codec, free_text=True))
    return PILImage.open(io.BytesIO(base64.b64decode(url.partition(",")[2]))).size


@pytest.mark.parametrize("codec, size", [(Codec("pixel"), (120, 90)), (Codec("qwen2_5_vl"), (112, 84)),
                                         (Codec("qwen2_5_vl", max_pixels=56 * 56), (56, 28)),
                                         (Codec("qwen3_vl"), (112, 84))])
def test_the_picture_has_the_size_of_the_students(codec, size):
    packed = io.BytesIO()
    PILImage.new("L", (120, 90)).save(packed, "PNG")
    row = dict(image={"bytes": packed.getvalue(), "path": None}, expression="the ship", box=[60, 45, 120, 90],
               width=120, height=90)
    assert picture_size(row, codec) == size
    assert (PILImage.open(io.BytesIO(base64.b64decode(data_url(make_question(row, codec)).partition(",")[2])))
            .size == (120, 90))
    if codec.name != "qwen3_vl":
        assert (f"{size[0]} wide and {size[1]} high" in write_prompt(row, codec, free_text=True)
                and str(list(codec.encode(row["box"], 120, 90))) in write_prompt(row, codec, free_text=True))
    else:
        assert ("run from 0 to 1000" in write_prompt(row, codec, free_text=True)
                and "[500, 500, 1000, 1000]" in write_prompt(row, codec, free_text=True))


PLAIN = ROWS.cast_column("image", Image(decode=False))
HERE = Server("http://127.0.0.1:1/v1", "m")


@pytest.mark.parametrize("change",
                         [dict(model="n"), dict(max_tokens=9), dict(temperature=1.0), dict(seed=1),
                          dict(seed=None), dict(more={"top_p": 0.5}), dict(image=PLAIN[1]["image"]),
                          dict(expression="the car"), dict(box=[1.0, 2.0, 30.0, 40.0]), dict(kind=TEXT),
                          dict(kind=OBJECT), dict(free_text=True), dict(objects=None)])
def test_what_shapes_the_answer_changes_the_key(change):
    server = replace(HERE, **{k: v for k, v in change.items()
                              if k in ("model", "max_tokens", "temperature", "seed", "more", "free_text")})
    row = {**PLAIN[0], **{k: v for k, v in change.items() if k in ("image", "expression", "box", "objects")}}
    assert content_key(server, make_question(row, CODEC), change.get("kind", SCHEMA)) != content_key(
        HERE, make_question(PLAIN[0], CODEC), SCHEMA)


def test_another_address_or_key_does_not_change_it(monkeypatch):
    keys = {content_key(replace(HERE, **change), make_question(PLAIN[0], CODEC), SCHEMA)
            for change in ({}, dict(url="https://example.invalid/v1"), dict(key_env="OTHER"),
                           dict(workers=1, timeout=1, max_retries=0))}
    monkeypatch.setenv("OPENAI_API_KEY", "sk-very-secret")
    assert keys == {content_key(HERE, make_question(PLAIN[0], CODEC), SCHEMA)}


@pytest.mark.parametrize("url, model, said",
                         [("localhost:8000/v1", "m", "http://"), ("ftp://h/v1", "m", "http://"),
                          ("", "m", "http://"), ("https://u:sk-secret@h/v1", "m", "key_env"),
                          ("https://h/v1?key=sk-secret", "m", "key_env"), ("http://h/v1", "", "which model"),
                          ("http://h:99999/v1", "m", "[Pp]ort"), ("http://a b/v1", "m", "http://")])
def test_a_server_that_cannot_be_meant_is_refused(url, model, said):
    with pytest.raises(ValueError, match=said) as caught: Server(url, model)
    assert "sk-secret" not in str(caught.value)


def command(url, tmp_path, *more):
    return ["cot", "--out", str(tmp_path / "out"), "--limit", "2", "--samples", "1", "--teacher", "chat",
            "--url", url, "--model", "m", *more]


@pytest.mark.parametrize("name",
                         ["NOT_SET", "OPENAI_API_KEY", "abcdefghijklmnop", "sk-very-secret", "EMPTY", ""])
def test_a_key_env_that_names_no_variable_with_a_value_is_refused_without_being_shown(tmp_path, monkeypatch,
                                                                                      capsys, name):
    monkeypatch.setenv("EMPTY", " ")
    assert main(command("http://127.0.0.1:1/v1", tmp_path, "--key-env", name)) == 2
    said = capsys.readouterr().err
    assert ("environment variable" in said and said.count("\n") == 1 and (len(name) < 15 or name not in said)
            and not (tmp_path / "out").exists())
    if name != "OPENAI_API_KEY":
        assert (main(command("http://127.0.0.1:1/v1", tmp_path, "--settings", json.dumps({"key_env": name})))
                == 2 and "environment variable" in capsys.readouterr().err)


SECRETS = {"api_key": "my-own-1", "user": {"Authorization": "my-own-2"}, "extra": ["sk-my-own-3"],
           "note": "Bearer my-own-4", "session_token": "my-own-5", "id": "myown12345678901234567890"}


def test_secrets_in_settings_reach_the_server_and_are_not_written_down(faulty, tmp_path, monkeypatch, capfd):
    s = faulty()
    words = command(f"http://127.0.0.1:{s.port}/v1", tmp_path, "--settings",
                    json.dumps({"max_tokens": 77, "more": {"top_p": 0.5, **SECRETS}}))
    monkeypatch.setattr(sys, "argv", ["rsground", *words])
    assert main(words) in (0, 1) and len(s.log()) == 2
    left = (b"".join(p.read_bytes() for p in (tmp_path / "out").rglob("*") if p.is_file())
            + "".join(capfd.readouterr()).encode())
    assert b"my-own" not in left and b"myown" not in left and b"max_tokens" in left and b"top_p" in left
    assert "own" not in json.dumps(without_secrets(SECRETS)) + repr(Server("http://h/v1", "m", more=SECRETS))


def test_nobody_at_the_address_ends_the_command_before_anything_is_written(tmp_path, capsys):
    assert main(command(f"http://127.0.0.1:{free_port()}/v1", tmp_path)) == 2
    assert "is the server running" in capsys.readouterr().err and not (tmp_path / "out").exists()


def test_a_key_given_for_its_name_is_not_shown():
    with pytest.raises(ValueError, match="not the key itself") as caught:
        Server("http://h/v1", "m", key_env="sk-secret")
    assert "sk-secret" not in str(caught.value)


def test_a_cache_that_cannot_be_written_is_an_error_of_the_system(tmp_path):
    (tmp_path / "folder").mkdir()
    with pytest.raises(OSError, match="folder: unable to open"): ReplyCache(tmp_path / "folder")
    store = ReplyCache(tmp_path / "replies.sqlite")
    store.execute("PRAGMA max_page_count = 4")  # what SQLite says of a full disk
    with pytest.raises(OSError, match="replies.sqlite: .*full"):
        store.put("k", Reply("long " * 9999, "stop", 1, False))
    assert store.get("k") is None


def test_a_key_with_a_line_break_is_not_shown(monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", "sk-secret\nsk-other")
    with pytest.raises(ValueError, match="OPENAI_API_KEY") as caught: HERE.key()
    assert "sk-" not in str(caught.value)


def test_a_file_that_is_no_cache_is_left_alone(tmp_path):
    (tmp_path / "notes.txt").write_text("something else, and more than a header's worth of it" * 3)
    with pytest.raises(ValueError, match="notes.txt is not a cache of replies"):
        chat_drafts(ROWS, CODEC, HERE, tmp_path / "notes.txt")
    assert (tmp_path / "notes.txt").read_text().startswith("something else")
    other = sqlite3.connect(tmp_path / "other.sqlite")
    other.execute("CREATE TABLE replies (a, b)"); other.close()
    with pytest.raises(ValueError, match="other.sqlite"): ReplyCache(tmp_path / "other.sqlite")


def test_the_prompt_version_follows_the_template():
    assert PROMPT_VERSION == hashlib.sha256(TEMPLATE.read_text(encoding="utf-8").encode()).hexdigest()[
        :8], "the template has changed: renew PROMPT_VERSION"


@pytest.mark.parametrize("free_text", [True, False])
def test_an_expression_is_text_to_the_template(free_text):
    said = write_prompt({**PLAIN[0], "expression": 'the {{ box }} "ship" {% if %}\n<b>& {# x #}'}, CODEC,
                        free_text)
    assert 'the {{ box }} "ship" {% if %} <b>& {# x #}' in said


PIECES = ["{", "}", "[", "]", '"reasoning"', ": ", '"box"', ", ", '"a (3, 4)"', "1, 2, 30, 40", "7", "null",
          "<think>", "</think>", "<answer>", "</answer>", "```json\n", "\n", "\\", '"', "é",
          "{\"reasoning\": \"a\", \"box\": "]


@given(st.one_of(st.lists(st.sampled_from(PIECES), max_size=30).map("".join), st.text()))
@settings(max_examples=500, deadline=None)
def test_no_reply_breaks_the_reader_and_no_box_is_made_up(text):
    made = read_reply(text)
    box = parse_completion(made).box
    if box: assert {int(v) for v in box} <= {int(n) for n in re.findall(r"\d+", text)}
    if "{" not in text and "<" not in text: assert made == text.strip()


@given(st.integers(0, 300), st.sampled_from(["", "Well: ", "```json\n"]))
def test_a_reply_cut_anywhere_has_its_box_or_none(cut, before):
    whole = json.dumps({"reasoning": "The \"ship\" at (3, 4), {left} of [the] car.", "box": [1, 2, 30, 40]})
    text = (before + whole)[:cut]
    # one whole box is read
    assert parse_completion(read_reply(text)).box == ((1, 2, 30, 40) if "[1, 2, 30, 40]" in text else None)


@pytest.mark.parametrize("reply, completion", [
    ('{"box": [1, 2, 3, 4], "reasoning": "a\nb"}', "<think>a\nb</think><answer>[1, 2, 3, 4]</answer>"),
    ('<think>hm, {1}</think>{"reasoning": "<think>a</think>", "box": "[1, 2, 3, 4]"}',
     "<think>a</think><answer>[1, 2, 3, 4]</answer>"),
    ('{"reasoning": "first thought", "box": [9, 9, 10, 10]} no: {"reasoning": "a", "box": '
     '[1, 2, 3, 4]} {"reas', "<think>a</think><answer>[1, 2, 3, 4]</answer>"),
    ('[{"reasoning": "a", "box": [1.0, 2.5, 3, 4]}]', "<think>a</think><answer>[1, 2.5, 3, 4]</answer>"),
    ('{"reasoning": ["a"], "box": [1, 2, 3, 4]}', '{"reasoning": ["a"], "box": [1, 2, 3, 4]}'),
    ('{"reasoning": "a", "bbox": [1, 2, 3, 4]}', '{"reasoning": "a", "bbox": [1, 2, 3, 4]}'),
    ("<think>a</think> <answer>[1, 2", "<think>a</think> <answer>[1, 2"), ("", ""),
    ("{" * 5000 + "[" * 5000, "{" * 5000 + "[" * 5000)])
def test_replies_as_they_come(reply, completion): assert read_reply(reply) == completion


def test_server_and_client_are_killed_and_nothing_is_lost_or_asked_twice(tmp_path):
    runs, facts = kill_test(tmp_path, count=10, kills=1, seed=0, seconds=240)
    assert facts["kills"] == 2 and facts["repeated"] == 0 and facts["same_text_again"], (runs, facts)
    assert (facts["rows"], facts["duplicates"], facts["without_reply"], facts["replies"]) == (10, 0, 0, 10)
    assert runs[-1]["requests"] == 0 and facts["requests"] >= 10
