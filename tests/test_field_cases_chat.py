"""What servers do in the field: the cases of kind "chat" in field_cases, each played by a scripted server."""
import json


from faulty_server import free_port
from rsground_nb.boxes import parse_completion
from rsground_nb.chat import BoundedHttp
from rsground_nb.run import main
from test_chat import draw, faulty, no_key  # noqa: F401


def content_parts(faulty, tmp_path, given):
    given["choices"][0]["message"]["content"] = [{"type": "text", "text": t} for t in (
        "<think>The ship.</think>", "<answer>[1, 2, ", "3, 4]</answer>")]
    d = draw(faulty("raw=" + json.dumps(given)).server(), tmp_path, 1)[0]
    assert (d.completion == "<think>The ship.</think><answer>[1, 2, 3, 4]</answer>"
            and parse_completion(d.completion).box == (1, 2, 3, 4))


def response_format_500(faulty, tmp_path, given):
    s = faulty(f"always:unless_text={given['status']}")
    before = len(s.log())
    assert not any(d.trouble for d in draw(s.server(), tmp_path, 3))
    assert [x["kind"] for x in s.log()[before:]] == ["json_schema", "json_object", "text", "text", "text"]


def error_in_200(faulty, tmp_path, given):
    assert given["error"]["message"] in draw(faulty("raw=" + json.dumps(given)).server(), tmp_path,
                                             1)[0].trouble


def only_reasoning(faulty, tmp_path, given):
    assert "it wrote only reasoning" in draw(faulty("raw=" + json.dumps(given)).server(), tmp_path,
                                             1)[0].trouble


def detail_422(faulty, tmp_path, given):
    trouble = draw(faulty("always:detail").server(), tmp_path, 1)[0].trouble
    assert (trouble == f"HTTP {given['status']}: {'.'.join(given['detail'][0]['loc'])}: "
            f"{given['detail'][0]['msg']}")


def dead_port(faulty, tmp_path, given, monkeypatch, capsys):
    sent, send = [], BoundedHttp.send
    async def counted(self, request, **options):
        sent.append(request.extensions["timeout"])
        return await send(self, request, **options)
    monkeypatch.setattr(BoundedHttp, "send", counted)
    assert main(["cot", "--out", str(tmp_path / "c"), "--limit", "24", "--teacher", "chat", "--url",
                 f"http://127.0.0.1:{free_port()}/v1", "--model", "m"]) == 2
    assert "no connection" in capsys.readouterr().err and len(sent) == 1 and max(sent[0].values()) < 10


PLAYED = dict(chat_content_parts=content_parts, chat_response_format_500=response_format_500,
              chat_error_in_200=error_in_200, chat_only_reasoning=only_reasoning, chat_detail_422=detail_422)


def test_every_case_is_handled(shared, faulty, tmp_path, monkeypatch, capsys):  # noqa: F811
    cases = [c for c in map(json.loads,
                            (shared / "field_cases" / "cases.jsonl").read_text(encoding="utf-8").splitlines())
             if c["kind"] == "chat"]
    assert {c["id"] for c in cases} == PLAYED.keys() | {"chat_dead_port"}
    for n, case in enumerate(cases):
        folder = tmp_path / str(n)
        folder.mkdir()
        if case["id"] == "chat_dead_port": dead_port(faulty, folder, case["input"], monkeypatch, capsys)
        else: PLAYED[case["id"]](faulty, folder, case["input"])
