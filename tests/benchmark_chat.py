"""The kill test of reference/chat: rows of drawn scenes are put to transformers' own server; server and
client are killed again and again, and what is left at the end is counted.

    python tests/benchmark_chat.py [--count 500] [--kills 3] [--seed 0] [--out tests/benchmark_chat.csv]

Server (the tiny model) and client are processes of their own and get SIGKILL, each `kills` times, when
a random number of rows is in the cache and a random part of a second has passed. A killed server is
started again on the same port after up to three seconds, while the client waits; a killed client at
once. In the end the client runs once more without any server. "repeated" counts the requests that
reached the server after the reply to the very same request had been stored. Not a test;
tests/test_chat.py runs the same function on fewer rows.
"""
import os

os.environ["OMP_NUM_THREADS"] = "1"  # before numpy is loaded

import argparse
import csv
import json
import sqlite3
import subprocess
import sys
import time
from importlib.metadata import version
from pathlib import Path

import numpy as np
from datasets import Image

from faulty_server import body_hash, free_port, wait_for
from rsground_nb.boxes import Codec
from rsground_nb.chat import ASSETS, Server, chat_drafts, content_key, data_url, make_question, make_request
from rsground_nb.data import to_dataset
from rsground_nb.scenes import scene_records

HERE = Path(__file__).resolve().parent
CODEC = Codec("qwen2_5_vl", 28, 56 * 56, 112 * 112)


def make_rows(count, seed): return to_dataset(list(scene_records(count, seed)))


def server_at(port):
    return Server(f"http://127.0.0.1:{port}/v1", str(ASSETS / "tiny"), max_tokens=16, workers=4, timeout=60,
                  max_retries=12, free_text=True)


def client(port, folder, count, seed):
    """What the client's process does: ask for all rows, write down what it got."""
    rows = make_rows(count, seed)
    drafts = chat_drafts(rows, CODEC, server_at(port), Path(folder, "replies.sqlite"))
    Path(folder, "drafts.json").write_text(json.dumps([(i, d.completion, d.trouble, d.details["cached"])
                                                       for i, d in zip(rows["expression_id"], drafts)]))


def stored(folder):
    """{key: when its reply was stored}"""
    path = Path(folder, "replies.sqlite")
    if not path.exists(): return {}
    db = sqlite3.connect(path, timeout=60)
    try: return dict(db.execute("SELECT key, time FROM replies"))
    except sqlite3.OperationalError: return {}  # the client has not made the table yet
    finally: db.close()


def log_lines(folder):
    path = Path(folder, "server.jsonl")
    return ([json.loads(line) for line in path.read_text().splitlines() if line.endswith("}")]
            if path.exists() else [])


class Pair:
    """A server and a client, each a process that can be killed and started again."""

    def __init__(self, folder, count, seed):
        self.folder, self.port, self.asked_for, self.runs = Path(folder), free_port(), (count, seed), []
        self.start_server(); self.start_client()

    def spawn(self, name, *command):
        out = self.folder / f"{name}.out"
        with out.open("ab") as sink:
            return subprocess.Popen([sys.executable, *map(str, command)], stdin=subprocess.PIPE, stdout=sink,
                                    stderr=sink, cwd=HERE)

    def start_server(self):
        self.server = self.spawn("server", HERE / "serve_tiny.py", self.port, self.folder / "server.jsonl")

    def start_client(self):
        # a client gives up at once where nobody is
        wait_for(self.server, self.port, self.folder / "server.out")
        self.runs.append(dict(run=len(self.runs) + 1, began=time.time(),
                              cached_at_start=len(stored(self.folder))))
        self.client = self.spawn("client", HERE / "benchmark_chat.py", "--client", self.port, self.folder,
                                 *self.asked_for)

    def drafts(self):
        """As the client that came to its end left them."""
        if self.client.returncode: raise RuntimeError((self.folder / "client.out").read_text()[-800:])
        return json.loads((self.folder / "drafts.json").read_text())

    def kill(self, who):
        process = getattr(self, who)
        process.kill(); process.communicate()

    def wait(self, until, ready):
        """Until `ready()`, or the client has ended. Raises TimeoutError at the time `until`."""
        while not ready() and self.client.poll() is None:
            if time.monotonic() > until:
                raise TimeoutError(f"{len(stored(self.folder))} replies so far; "
                                   f"{(self.folder / 'client.out').read_text()[-800:]}")
            time.sleep(0.02)


def kill_test(folder, count, kills, seed, seconds):
    """(table with a line per run of the client, counts at the end) after `kills`
    deaths of server and client each."""
    rng, until, began = np.random.default_rng(seed), time.monotonic() + seconds, time.time()
    victims = rng.permutation(["server", "client"] * kills)
    moments = np.sort(rng.choice(np.arange(1, int(0.9 * count)), len(victims), replace=False))
    pair, done = Pair(folder, count, seed), 0
    try:
        for who, moment in zip(victims, moments):
            pair.wait(until, lambda: len(stored(folder)) >= moment)
            time.sleep(rng.uniform(0, 0.5))
            done += getattr(pair, who).poll() is None
            pair.kill(who)
            if who == "server":
                time.sleep(rng.uniform(0, 3))
                pair.start_server()
            else: pair.start_client()
        pair.wait(until, lambda: False)
    finally: pair.kill("client"); pair.kill("server")
    first = pair.drafts()
    pair.runs.append(dict(run=len(pair.runs) + 1, began=time.time(), cached_at_start=len(stored(folder))))
    client(pair.port, folder, count, seed)  # once more, with no server there: everything must be in the cache
    return count_up(pair, count, seed, first, dict(kills=done, minutes=round((time.time() - began) / 60, 1)))


def count_up(pair, count, seed, first, facts):
    """What the server's log and the cache say about it."""
    server, when, key_of, log, drafts = (server_at(pair.port), stored(pair.folder), {},
                                         log_lines(pair.folder), pair.drafts())
    for row in make_rows(count, seed).cast_column("image", Image(decode=False)):
        question = make_question(row, CODEC, free_text=True)
        key_of[body_hash(make_request(server, question.prompt, data_url(question), "json_schema"))] = (
            content_key(server, question, "json_schema"))
    asked = [x for x in log if x["what"] == "asked"]
    late = [x for x in asked if x["time"] > when[key_of[x["hash"]]]]
    ends = [r["began"] for r in pair.runs[1:]] + [float("inf")]
    for run, end in zip(pair.runs, ends):
        began = run.pop("began")
        run |= {"requests": sum(began <= x["time"] < end for x in asked),
                "answered": sum(x["what"] == "200" and began <= x["time"] < end for x in log),
                "repeated": sum(began <= x["time"] < end for x in late),
                "cached_at_end": sum(t < end for t in when.values())}
    ids = [i for i, *_ in drafts]
    return pair.runs, dict(rows=len(ids), duplicates=len(ids) - len(set(ids)), without_reply=sum(
        bool(t) and "the reply is empty" not in t for _, _, t, _ in drafts), replies=len(when),
                           requests=len(asked), repeated=len(late),
                           same_text_again=[c for _, c, *_ in first] == [c for _, c, *_ in drafts], **facts)


def main():
    if sys.argv[1:2] == ["--client"]:
        return client(int(sys.argv[2]), sys.argv[3], int(sys.argv[4]), int(sys.argv[5]))
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--count", type=int, default=500, help="rows")
    parser.add_argument("--kills", type=int, default=3, help="of the server, and as many of the client")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", help="also write the table to this CSV file")
    given = parser.parse_args()
    import tempfile
    with tempfile.TemporaryDirectory() as folder:
        runs, facts = kill_test(folder, given.count, given.kills, given.seed, 1800)
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=HERE, capture_output=True,
                            text=True).stdout.strip()
    facts |= dict(seed=given.seed, command=f"python tests/benchmark_chat.py --count {given.count} --kills "
                  f"{given.kills} --seed {given.seed}", commit=commit,
                  versions=" ".join(f"{p} {version(p)}" for p in ("openai", "transformers", "torch")))
    columns = ["run", "cached_at_start", "requests", "answered", "repeated", "cached_at_end"]
    table = [columns + ["what", "value"]] + [[r[c] for c in columns] + ["", ""] for r in runs] + [
        ["all"] + [""] * 5 + [name, value] for name, value in facts.items()]
    csv.writer(sys.stdout, lineterminator="\n").writerows(table)
    if given.out:
        with open(given.out, "w", newline="", encoding="utf-8") as f:
            csv.writer(f, lineterminator="\n").writerows(table)


if __name__ == "__main__": main()
