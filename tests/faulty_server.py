"""A small chat server that misbehaves by plan, for tests of the client. One process of its own, standard library only.

    python tests/faulty_server.py PORT LOG FAULT FAULT …      the n-th request gets the n-th fault, those after the last one a good reply; "always:FAULT" never ends

Every request adds a line to LOG: time, SHA-256 of its body (as JSON with sorted keys), what was done, the retry number that the client states, its key.
It ends when the process that started it closes its standard input.
"""
import hashlib
import json
import os
import re
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

GOOD = {"id": "1", "object": "chat.completion", "created": 0, "model": "m", "usage": {"prompt_tokens": 90, "completion_tokens": 10, "total_tokens": 100}}


def body_hash(body):
    """Of a request, however its JSON was written."""
    return hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()


def reply_to(body, fault):
    box = json.loads(re.search(r"\[\d+, \d+, \d+, \d+\]", body["messages"][0]["content"][1]["text"])[0])
    centre = (box[0] + box[2]) // 2, (box[1] + box[3]) // 2
    text, reason = json.dumps({"reasoning": f"The sentence names one thing. It lies at {centre}.", "box": box}), "stop"
    if fault == "tags" or ("response_format" not in body and fault == "noformat"): text = f"<think>It lies at {centre}.</think><answer>{box}</answer>"
    if fault == "length": text, reason = text[:40], "length"
    if fault == "abort": text, reason = text[:40], "abort"
    if fault == "empty": text = None
    if fault == "surrogate": text = "<think>\\ud83d</think><answer>[1, 2, 3, 4]</answer>".encode().decode("unicode_escape")
    made = {**GOOD, "choices": [{"index": 0, "finish_reason": reason, "message": {"role": "assistant", "content": text}}]}
    if fault == "nousage": made.pop("usage")
    if fault == "nochoices": made = {"error": {"message": "upstream is busy"}}
    if fault == "oddchoices": made["choices"] = {"0": "a"}
    if fault == "oddusage": made["usage"] = ["many"]
    if fault == "refusal": made["choices"][0]["message"] = {"role": "assistant", "content": None, "refusal": "I will not look at this."}
    if fault == "thinks": made["choices"][0] = {"index": 0, "finish_reason": "length", "message": {"role": "assistant", "content": None, "reasoning_content": "Hm, let me see"}}
    return made


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *args): pass

    def do_GET(self): self.send(200, b"{}")

    def send(self, status, data, kind="application/json", length=None, **headers):
        self.send_response(status)
        for name, value in {"Content-Type": kind, "Content-Length": str(len(data) if length is None else length), **headers}.items(): self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        self.wfile.write(data)

    def error(self, status, message, **headers): self.send(status, json.dumps({"error": {"message": message}}).encode(), **headers)

    def do_POST(self):
        began, body = time.time(), json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        key = self.headers.get("Authorization", "").removeprefix("Bearer ")
        with LOCK:
            fault = next(PLAN)
            with open(LOG, "a", encoding="utf-8") as f:
                f.write(json.dumps(dict(time=began, hash=body_hash(body), fault=fault, retry=int(self.headers.get("x-stainless-retry-count", 0)), key=key, format="response_format" in body)) + "\n")
        name, _, value = fault.partition("=")
        if name == "slow": time.sleep(float(value))
        if name == "429": return self.error(429, "too many requests", Retry_After=value or "1")
        if name == "close": return self.close()
        if name == "html": return self.send(200, b"<html>Please log in</html>", "text/html")
        if name.isdigit(): return self.error(int(name), f"HTTP {name} for the key {key}" + "\ud83d" * (value == "surrogate"))
        if name == "noformat" and "response_format" in body: return self.error(400, "response_format is not supported")
        data = json.dumps(reply_to(body, name)).encode()
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
    PLAN, LOG, LOCK = plan(sys.argv[3:]), sys.argv[2], threading.Lock()
    threading.Thread(target=lambda: (sys.stdin.read(), os._exit(0)), daemon=True).start()
    ThreadingHTTPServer(("127.0.0.1", int(sys.argv[1])), Handler).serve_forever()
