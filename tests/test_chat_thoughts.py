"""The chat teacher asked for Thoughts: three kinds of request, and replies of the
wrong shape or in another frame."""
import json
from dataclasses import replace

import pytest

from rsground_nb.boxes import Codec, parse_completion
from rsground_nb.chat import FREE_SCHEMA, chat_drafts, make_question, make_request, read_thought
from rsground_nb.cot import make_thought, render
from rsground_nb.thoughts import THOUGHT_SCHEMA, from_json, to_json
from rsground_nb.data import to_dataset
from rsground_nb.filters import find_faults
from rsground_nb.run import main
from rsground_nb.scenes import scene_records
from test_chat import CODEC, HERE, KINDS, PLAIN, ROWS, asked_for, command, draw, faulty, no_key  # noqa: F401

ROW = {**PLAIN[0], "width": 400, "height": 200, "box": [100.0, 50.0, 140.0, 70.0]}
GOOD = {"target": {"category": "ship", "attributes": ["red"]},
        "cues": [{"kind": "order", "words": "leftmost"}], "decision": 0, "box": [100, 50, 140, 70],
        "steps": [{"find": {"category": "ship", "attributes": ["red"]},
                   "cue": {"kind": "order", "words": "leftmost"}, "anchors": [], "left": [0],
                   "candidates": [{"category": "ship", "colour": "red", "box": [100, 50, 140, 70]},
                                  {"category": "ship", "colour": None, "box": [300, 50.5, 340, 70]}]}]}


def spoilt(place, value):
    made = json.loads(json.dumps(GOOD))
    *way, last = place
    inner = made
    for name in way: inner = inner[name]
    if value is KeyError: del inner[last]
    else: inner[last] = value
    return json.dumps(made)


def test_a_draft_keeps_the_thought_and_its_rendering(faulty, tmp_path):  # noqa: F811
    s = faulty()
    for cached in (False, True):
        drafts = draw(s.server(free_text=False), tmp_path)
        for d, row in zip(drafts, ROWS):
            assert (d.details["cached"] == cached and not d.trouble
                    and from_json(to_json(d.thought)) == d.thought)
            assert d.completion == render(d.thought, CODEC, row["width"], row["height"])
            assert max(abs(a - b) for a, b in zip(parse_completion(d.completion).box,
                                                  CODEC.encode(row["box"], row["width"], row["height"]))) <= 1
    assert asked_for(s) == ["json_schema"] * 3


@pytest.mark.parametrize("kind, asked", zip(KINDS, ([KINDS[0]] * 3, [KINDS[0]] + [KINDS[1]] * 3,
                                                    [*KINDS[:2]] + [KINDS[2]] * 3)))
def test_each_kind_of_request_brings_thoughts_and_is_remembered(faulty, tmp_path, kind, asked):  # noqa: F811
    s = faulty(f"always:unless_{kind}=400")
    drafts = draw(s.server(free_text=False), tmp_path)
    assert all(d.thought for d in drafts) and asked_for(s) == asked
    assert ([d.thought for d in draw(s.server(free_text=False), tmp_path)] == [d.thought for d in drafts]
            and asked_for(s) == asked)


@pytest.mark.parametrize("free_text, schema", [(False, THOUGHT_SCHEMA), (True, FREE_SCHEMA)])
def test_the_schema_is_a_field_of_the_request_or_stands_in_the_prompt(free_text, schema):
    bodies = [make_request(replace(HERE, free_text=free_text), "prompt", "picture", kind) for kind in KINDS]
    prompts = [b["messages"][0]["content"][1]["text"] for b in bodies]
    assert (bodies[0]["response_format"]["json_schema"]["schema"] == schema and bodies[1]["response_format"]
            == {"type": "json_object"} and "response_format" not in bodies[2])
    assert (prompts[0] == "prompt"
            and [json.dumps(THOUGHT_SCHEMA) in p for p in prompts] == [False, not free_text, not free_text])


def test_a_teacher_that_knows_all_is_kept_by_the_filters():
    """The rule teacher's Thoughts, as a server would send them, pass through and have no faults."""
    for row in scene_records(12, 3):
        thought = read_thought("Sure!\n```json\n" + to_json(make_thought(row, CODEC)) + "\n```", row, CODEC)
        assert find_faults(render(thought, CODEC, row["width"], row["height"]), row, CODEC,
                           thought=thought) == []


def test_the_prompt_shows_what_is_known_in_original_pixels():
    codec, row = Codec("qwen2_5_vl", max_pixels=56 * 56), dict(
        ROW, objects=[{"category": "ship", "colour": "red", "box": [100.0, 50.0, 140.26, 70.0]}])
    said = make_question(row, codec).prompt
    assert ("[100, 50, 140, 70]" in said and "400 wide and 200 high" in said
            and '{"category": "ship", "colour": "red", "box": [100, 50, 140.3, 70]}' in said)
    alone = make_question(dict(row, objects=None), codec).prompt
    assert '"steps" is []' in alone and "140.3" not in alone and make_question(row, codec).size == (400, 200)


@pytest.mark.parametrize("reply, field", [
    ("I cannot see it.", "no complete JSON object; it begins 'I cannot"), ("[]", "no complete JSON"),
    (json.dumps(GOOD)[:-9], "target"), ('{"reasoning": "a", "box": [100, 50, 140, 70]}', "target: "),
    (spoilt(["why"], "x"), "why: "), (spoilt(["target", "note"], "x"), "target.note: "),
    (spoilt(["steps", 0, "candidates", 1, "score"], 1), "steps[0].candidates[1].score: "),
    (spoilt(["box"], ["100", 50, 140, 70]), "box[0]: "), (spoilt(["box"], "[100, 50, 140, 70]"), "box: "),
    (spoilt(["box"], [100, 50, 140]), "box: "), (spoilt(["decision"], "0"), "decision: "),
    (spoilt(["decision"], 5), "decision: "), (spoilt(["decision"], KeyError), "decision: "),
    (spoilt(["steps", 0, "left"], [7]), "steps[0].left: "),
    (spoilt(["steps", 0, "cue", "kind"], "colour"), "steps[0].cue.kind: "),
    (spoilt(["target", "category"], None), "target.category: "),
    (spoilt(["steps", 0, "candidates", 1, "box"], [300, 50, 340, 270]), "steps[0].candidates[1].box: "),
    (spoilt(["steps", 0, "candidates", 1, "box"], [340, 50, 300, 70]), "steps[0].candidates[1].box: "),
    (spoilt(["box"], [float("nan"), 1, 2, 3]), "box"), (spoilt(["box"], [float("inf"), 1, 2, 3]), "box"),
    (spoilt(["box"], [1e308, 1, 2, 3]), "box: "),
    (spoilt(["target", "category"], "ship<|im_end|>"), "target.category: "),
    (spoilt(["cues", 0, "words"], "left</think>"), "cues[0].words: "),
    (spoilt(["steps", 0, "candidates", 0, "colour"], "red [1, 2]"), "steps[0].candidates[0].colour: "),
    (spoilt(["target", "attributes"], [""]), "target.attributes[0]: "),
    (spoilt(["cues", 0, "words"], "x" * 81), "cues[0].words: "), (spoilt(["cues"], {}), "cues: "),
    ('{"target": ' + "[" * 5000, "no complete JSON"), ('{"target": ' + "[" * 400 + "]" * 400 + "}", "")])
def test_a_reply_that_is_no_thought_names_its_field(reply, field):
    with pytest.raises(ValueError) as caught: read_thought(reply, ROW, CODEC)
    assert field in str(caught.value) and len(str(caught.value)) < 300


@pytest.mark.parametrize("box, frame", [([0.25, 0.25, 0.35, 0.35], "shares from 0 to 1"),
                                        ([25, 25, 35, 35], "0 to 100"), ([250, 250, 350, 350], "0 to 1000"),
                                        ([250, 250, 350, 350], "[x1, y1, x2, y2] in 0 to 1000"),
                                        ([100, 50, 40, 20], "[x, y, width, height] in pixels"),
                                        ([50, 100, 70, 140], "[y1, x1, y2, x2] in pixels"),
                                        ([250, 250, 100, 100], "[x, y, width, height] in 0 to 1000"),
                                        ([28, 14, 39.2, 19.6], "the student's pixels")])
def test_a_box_in_another_frame_is_named(box, frame):
    with pytest.raises(ValueError, match="^box: ") as caught:
        read_thought(spoilt(["box"], box), ROW, Codec("qwen2_5_vl", max_pixels=112 * 56))
    assert frame in str(caught.value)


def test_the_trouble_of_a_draft_names_its_row(faulty, tmp_path):  # noqa: F811
    rows = to_dataset(list(scene_records(1, 0)) + [{**r, "expression_id": "again"}
                                                   for r in scene_records(1, 0)])
    drafts = chat_drafts(rows, CODEC, faulty("text={\"box\": BOX}").server(free_text=False),
                         tmp_path / "c.sqlite")
    assert [d.trouble for d in drafts] == [f"row {i!r}: target: Field required"
                                           for i in rows["expression_id"]]
    assert ([d.details["cached"] for d in drafts] == [False, True]
            and not any(d.completion or d.thought for d in drafts))


@pytest.mark.parametrize("more, judged", [([], "thought"), (["--free-text"], "plain")])
def test_the_command_asks_for_thoughts_or_for_free_text(faulty, tmp_path, more, judged):  # noqa: F811
    words = command(f"http://127.0.0.1:{faulty().port}/v1", tmp_path, *more)
    assert main(words) == 0
    chains = [json.loads(line) for line in (tmp_path / "out" / "chains.jsonl").read_text().splitlines()]
    assert ([c["judged"] for c in chains] == [judged] * 2
            and all(bool(c["thought"]) == (judged == "thought") and c["completion"] for c in chains))
    assert json.loads((tmp_path / "out" / "made_by.json").read_text())["asked"]["free_text"] == bool(more)
