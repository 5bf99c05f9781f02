"""A small chat server that misbehaves by plan, for tests of the client. One process of
its own, standard library only.

    python tests/faulty_server.py PORT LOG FAULT FAULT …
        the n-th request gets the n-th fault, those after the last one a good reply; "always:FAULT" never
        ends; "probe:FAULT" is for GET /v1/models

Every request adds a line to LOG: time, SHA-256 of its body (as JSON with sorted keys), what was done, the
retry number that the client states, its key, the kind of reply it asks for. A fault that goes on and on
("drip", "endless") adds a line to LOG.sent when the client has hung up, or after its 2,000 parts: how many
parts were sent. "raw=JSON" answers with that JSON; "unless_KIND=STATUS" answers with the status unless the
request asks for a reply of that kind (json_schema, json_object, text), "at=MEMBER:VALUE" puts a value into a
good reply ("KEY" in it stands for the key). A prompt that asks for "steps" gets a Thought without any,
another one gets sentences; "text=..." answers with that text, in which BOX stands for the true box. It ends
when the process that started it closes its standard input.
"""
import gzip
import hashlib
import json
import os
import re
import socket
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.request import urlopen

GOOD = {"id": "1", "object": "chat.completion", "created": 0, "model": "m",
        "usage": {"prompt_tokens": 90, "completion_tokens": 10, "total_tokens": 100}}


def free_port():
    """A port of the loopback that nobody listens on."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def wait_for(process, port, log, seconds=120):
    """Returns when the server answers. Raises RuntimeError with the end of its log if it ends or takes too
    long."""
    until = time.monotonic() + seconds
    while process.poll() is None and time.monotonic() < until:
        try: return urlopen(f"http://127.0.0.1:{port}/health", timeout=5).close()
        except OSError: time.sleep(0.2)
    raise RuntimeError("the server did not start: "
                       f"{log.read_text(encoding='utf-8', errors='replace')[-600:]}")


def body_hash(body):
    """Of a request, however its JSON was written."""
    return hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()


def reply_to(body, fault):
    prompt = body["messages"][0]["content"][1]["text"]
    box = json.loads(re.search(r"\[[\d.]+, [\d.]+, [\d.]+, [\d.]+\]", prompt)[0])
    centre = (box[0] + box[2]) // 2, (box[1] + box[3]) // 2
    text, reason = json.dumps({"reasoning": f"The sentence names one thing. It lies at {centre}.",
                               "box": box}), "stop"
    if '"steps"' in prompt:
        text = json.dumps({"target": {"category": "ship", "attributes": []}, "cues": [], "steps": [],
                           "decision": None, "box": box})
    if fault == "tags" or ("response_format" not in body and fault == "noformat"):
        text = f"<think>It lies at {centre}.</think><answer>{box}</answer>"
    if fault == "length": text, reason = text[:40], "length"
    if fault == "abort": text, reason = text[:40], "abort"
    if fault == "empty": text = None
    if fault == "surrogate":
        text = "<think>\\ud83d</think><answer>[1, 2, 3, 4]</answer>".encode().decode("unicode_escape")
    made = {**GOOD, "choices": [{"index": 0, "finish_reason": reason,
                                 "message": {"role": "assistant", "content": text}}]}
    if fault == "nousage": made.pop("usage")
    if fault == "nochoices": made = {"error": {"message": "upstream is busy"}}
    if fault == "oddchoices": made["choices"] = {"0": "a"}
    if fault == "oddusage": made["usage"] = ["many"]
    if fault == "refusal":
        made["choices"][0]["message"] = {"role": "assistant", "content": None,
                                         "refusal": "I will not look at this."}
    if fault == "thinks":
        made["choices"][0] = {"index": 0, "finish_reason": "length", "message":
                              {"role": "assistant", "content": None, "reasoning_content": "Hm, let me see"}}
    if fault == "part":
        made["choices"][0]["message"]["content"] = [{"type": "thinking", "thinking": "Hm"},
                                                    {"type": "text", "text": text[:9]},
                                                    {"type": "text", "text": text[9:]}]
    return made


def put(made, where, value):
    """`made` with the value at a place such as choices.0.message."""
    *way, last = where.split(".")
    for name in way: made = made[int(name) if name.isdigit() else name]
    made[last] = value


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *args): pass

    def do_GET(self):
        fault = AT_PROBE if self.path.endswith("/models") else ""
        if fault == "close": return self.close()
        if fault == "drip": return self.go_on(b" ", 0.1)
        self.send(int(fault or 200), b"{}")

    def send(self, status, data, kind="application/json", length=None, **headers):
        self.send_response(status)
        for name, value in {"Content-Type": kind,
                            "Content-Length": str(len(data) if length is None else length),
                            **headers}.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        self.wfile.write(data)

    def go_on(self, part, pause, head=b"HTTP/1.1 200 OK\r\n\r\n"):
        """Send a part again and again until the client hangs up."""
        sent = 0
        self.wfile.write(head)
        try:
            while sent < 2000: self.wfile.write(part); self.wfile.flush(); sent += 1; time.sleep(pause)
        except OSError: pass
        with LOCK, open(LOG + ".sent", "a") as f: f.write(f"{sent}\n")
        self.close_connection = True

    def error(self, status, message, **headers):
        self.send(status, json.dumps({"error": {"message": message}}).encode(), **headers)

    def do_POST(self):
        began, body = time.time(), json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        key, kind = (self.headers.get("Authorization", "").removeprefix("Bearer "),
                     body.get("response_format", {}).get("type", "text"))
        with LOCK:
            fault = next(PLAN)
            with open(LOG, "a", encoding="utf-8") as f:
                f.write(json.dumps(dict(time=began, hash=body_hash(body), fault=fault,
                                        retry=int(self.headers.get("x-stainless-retry-count", 0)), key=key,
                                        kind=kind)) + "\n")
        name, _, value = fault.partition("=")
        if name == "slow": time.sleep(float(value))
        if name == "429": return self.error(429, "too many requests", Retry_After=value or "1")
        if name == "close": return self.close()
        if name == "html": return self.send(200, b"<html>Please log in</html>", "text/html")
        if name == "redirect":
            return self.send(307, b"{}", Location=f"http://{self.headers['Host']}/v1/chat/completions?again")
        if name == "drip": return self.go_on(b" ", 0.1)
        if name == "endless": return self.go_on(b" " * 65536, 0)
        if name == "slowheader": return self.go_on(b"x", 0.1, b"HTTP/1.1 200 OK\r\nX-Slow: ")
        if name == "bomb": return self.send(200, gzip.compress(b" " * (1 << 28)), Content_Encoding="gzip")
        if name == "packed":
            return self.send(200, gzip.compress(json.dumps(reply_to(body, "ok")).encode()),
                             Content_Encoding=value or "gzip")
        if name == "raw": return self.send(200, value.replace("KEY", key).encode())
        if name == "deep": return self.send(200, b"[" * 200_000)
        if name == "detail":
            return self.send(422, json.dumps({"detail": [
                {"loc": ["body", "seed"], "msg": "extra fields not permitted", "input": body}]}).encode())
        if name.startswith("unless_") and kind != name.removeprefix("unless_"):
            return self.error(int(value), f"no {kind} here")
        if name.isdigit():
            return self.error(int(name), f"HTTP {name} for the key {key}" + "\ud83d" * (value == "surrogate"))
        if name == "noformat" and "response_format" in body:
            return self.error(400, "response_format is not supported")
        made = reply_to(body, name)
        if name == "text":
            made["choices"][0]["message"]["content"] = value.replace(
                "BOX", re.search(r"\[[\d.]+(?:, [\d.]+){3}\]", body["messages"][0]["content"][1]["text"])[0])
        if name == "at":
            put(made, value.partition(":")[0], json.loads(value.partition(":")[2].replace("KEY", key)))
        data = json.dumps(made).encode()
        if name == "cut": return self.send(200, data[:len(data) // 2], length=len(data)) or self.close()
        if name == "halfjson": return self.send(200, data[:len(data) // 2])
        self.send(200, data)

    def close(self):
        self.close_connection = True
        self.connection.shutdown(2)


def plan(faults):
    for fault in faults:
        while fault.startswith("always:"): yield fault.removeprefix("always:")
        yield fault
    while True: yield "ok"


if __name__ == "__main__":
    AT_PROBE = next((a.removeprefix("probe:") for a in sys.argv[3:] if a.startswith("probe:")), "")
    PLAN, LOG, LOCK = (plan([a for a in sys.argv[3:] if not a.startswith("probe:")]), sys.argv[2],
                       threading.Lock())
    threading.Thread(target=lambda: (sys.stdin.read(), os._exit(0)), daemon=True).start()
    ThreadingHTTPServer(("127.0.0.1", int(sys.argv[1])), Handler).serve_forever()
