"""transformers' own server with the tiny model, for tests, and every request is written down.

    python tests/serve_tiny.py PORT LOG

A request adds a line to LOG when it has arrived, and another when its answer has left: time, SHA-256 of the
body (as JSON with sorted keys), "asked" or the HTTP status.
"""
import json
import os
import sys
import threading
import time

from faulty_server import body_hash


class Logged:
    """The same ASGI application, with a log of its chat requests."""

    def __init__(self, app, path): self.app, self.path = app, path

    def write(self, what, body):
        with open(self.path, "a", encoding="utf-8") as f:
            f.write(json.dumps(dict(time=time.time(), hash=body_hash(json.loads(body)), what=what)) + "\n")

    async def __call__(self, scope, receive, send):
        if scope.get("path") != "/v1/chat/completions": return await self.app(scope, receive, send)
        parts, status = [await receive()], []
        while parts[-1].get("more_body"): parts.append(await receive())
        body = b"".join(p.get("body", b"") for p in parts)
        self.write("asked", body)
        async def again(): return parts.pop(0) if parts else await receive()
        async def told(message):
            await send(message)
            if message["type"] == "http.response.start": status.append(message["status"])
            elif not message.get("more_body"): self.write(str(status[0]), body)
        await self.app(scope, again, told)


if __name__ == "__main__":
    import torch
    from transformers import AutoProcessor
    from transformers.cli.serve import Serve
    from transformers.cli.serving import server

    from rsground_nb.loading import ASSETS, load_processor

    # transformers' own needs torchvision
    AutoProcessor.from_pretrained = lambda folder, **_: load_processor(folder, 112 * 112)
    build = server.build_server
    server.build_server = lambda *args, **more: Logged(build(*args, **more), sys.argv[2])
    # as its parent does
    threading.Thread(target=lambda: (sys.stdin.read(), os._exit(0)), daemon=True).start()
    torch.set_num_threads(1)
    Serve(force_model=str(ASSETS / "tiny"), port=int(sys.argv[1]), host="127.0.0.1", device="cpu")
