"""The rule teacher: every sentence of its chains is read by patterns of this file and held against the boxes, without any function of the chapter."""
import re
from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings, strategies as st
from PIL import Image

from rsground_nb import scenes
from rsground_nb.boxes import Codec, iou, parse_completion
from rsground_nb.cot import RULE_VERSION, TEXTS, Draft, rule_drafts, write_chain
from rsground_nb.data import load_folder, split_hash, to_dataset
from rsground_nb.filters import find_faults
from rsground_nb.scenes import STYLES, scene_records

PIXELS, GRID = Codec("qwen2_5_vl", max_pixels=112 * 112), Codec("qwen3_vl")
FORBIDDEN = re.compile(r"\b(?:box|boxes|annotat\w*|ground[- ]truth|given|told|label\w*|answer|coordinates)\b", re.I)


@pytest.fixture(scope="module")
def rows():
    """400 rows of each style; nothing is drawn."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(scenes, "draw_scene", lambda scene, rng: Image.new("RGB", (2, 2)))
        return [{k: v for k, v in r.items() if k != "image"} for style in STYLES for r in scene_records(400, 3, 112, style=style)]


# --- an independent reader

AT = r"\((\d+), (\d+)\)"
NOUN = "|".join(sorted(scenes.SHAPES, key=len, reverse=True))
COLOUR = "|".join({**scenes.COLOURS, **scenes.OTHER_COLOURS, **scenes.TONES})
PLACES = rf"(?:(?:\w+ )?at {AT}(?:, | and |))+(?:\d+ more)?"
PATTERNS = {
    "target": r"(?:The target is|I look for|Which one is) the (?P<name>[^(),]+)[.?]",
    "cue": r"(?:Cue|The cue is|Its cue is): (?P<cues>[^()]+)\.",
    "said": r"The sentence says \"[^\"]+\"\.|\"[^\"]+\" is what the sentence says\.|As the sentence says: \"[^\"]+\"\.",
    "look": r"(?:First )?I look at the (?P<cell>(?:top|bottom)(?: left| right)?|left|right|centre)(?: of the image)?\.",
    "one": rf"(?:There is only one|I see only one|Only one) (?P<colour>{COLOUR})? ?(?P<noun>{NOUN})(?: is in the image)?\.",
    "many": rf"(?:There are |The image has )?(?P<count>\w+) (?P<colour>{COLOUR})? ?(?P<noun>{NOUN})s(?: are in the image)?, (?P<places>{PLACES})\.",
    "row": rf"(?:From|The (?P<colour>{COLOUR})? ?(?P<noun>{NOUN})s from|I look from) the (?P<side>left|right|top|bottom)(?: the|:)? ?(?P<colour2>{COLOUR})? ?(?P<noun2>{NOUN})?s?(?: are)? (?P<places>{PLACES})\.",
    "anchor": rf"(?:The|I find the|Next, the) (?P<size>largest|smallest)? ?(?P<colour>{COLOUR})? ?(?P<noun>{NOUN})(?: is|: it is)? at {AT}\.",
    "only": rf"(?:Only one(?: of the (?P<count>\w+))?|One) is (?P<what>[a-z ]+?)(?:, and only one)?\.",
    "pick": rf"(?:At {AT} I see the (?P<w1>[a-z ]+)|At {AT} is the (?P<w2>[a-z ]+)|The one at {AT} is the (?P<w3>[a-z ]+))\.",
    "holds": rf"(?:The|I see that the) (?P<colour>{COLOUR})? ?(?P<noun>{NOUN}) is (?P<what>[a-z ]+?)(?:, as the cue says)?\.",
    "decide": rf"(?:The target is|I take) (?:the |that )(?P<reason>[a-z ]+)[,;] (?:near|its centre is near|its centre lies near) {AT}\.",
}
WORDS = {"two": 2, "three": 3, "four": 4, "five": 5}


def middle(box): return (box[0] + box[2]) / 2, (box[1] + box[3]) / 2


def third(box, row): return tuple(min(2, int(3 * c / s)) for c, s in zip(middle(box), (row["width"], row["height"])))


def in_cell(box, row, cell):
    column, line = third(box, row)
    return all({"left": column == 0, "right": column == 2, "top": line == 0, "bottom": line == 2, "centre": (column, line) == (1, 1)}[w] for w in cell.split())


def beside(box, other, words):
    (x, y), (u, v) = middle(box), middle(other)
    return {"left of": x < u, "right of": x > u, "above": y < v, "below": y > v}[words]


class Reader:
    """Holds one chain against its row; `fail` is raised by an assertion with the sentence."""
    def __init__(self, row, codec):
        self.row, self.codec, self.scale = row, codec, [f / s for f, s in zip(codec.frame(row["width"], row["height"]), (row["width"], row["height"]))]
        self.target = next(o for o in row["objects"] if o["box"] == row["box"])
        self.pool, self.anchor = None, None

    def at(self, x, y):
        """The objects whose centre is written so, off by no more than rounding."""
        return [o for o in self.row["objects"] if all(abs(c * s - v) <= 1.01 for c, s, v in zip(middle(o["box"]), self.scale, (int(x), int(y))))]

    def kind(self, noun, colour=None): return [o for o in self.row["objects"] if o["category"] == noun and colour in (None, o["colour"])]

    def fits(self, thing, what):
        """Is it 'red', 'above it', 'at the top left', or two of these?"""
        return all(thing["colour"] == w if re.fullmatch(COLOUR, w) else in_cell(thing["box"], self.row, w[7:]) if w.startswith("at the ") else beside(thing["box"], self.anchor["box"], w.removesuffix(" it"))
                   for w in what.split(" and "))

    def places(self, text, pool):
        """The listed objects: all different, all of the pool, none left out that is not in 'and N more'."""
        shown = []
        for colour, x, y in re.findall(rf"(?:({COLOUR}) )?at {AT}", text):
            found = [o for o in self.at(x, y) if o in pool and not any(o is s for s in shown) and colour in ("", o["colour"])]
            assert found
            shown.append(found[0])
        more = re.search(r"and (\d+) more$", text)
        assert len(shown) <= 4 and len(shown) + (int(more[1]) if more else 0) == len(pool) > 1 and any(s is self.target for s in shown)
        return shown

    def check(self, step, m):
        said = m.groupdict()
        colour, noun = said.get("colour") or said.get("colour2"), said.get("noun") or said.get("noun2")
        if step == "target": assert set(said["name"].split()) <= set(self.row["expression"].split()) and self.row["category"] in said["name"]
        if step == "cue": assert set(re.findall(r"[\w-]+", said["cues"])) <= set(self.row["expression"].split())
        if step == "look": assert in_cell(self.row["box"], self.row, said["cell"]) and (said["cell"] == "centre" or len(said["cell"].split()) == sum(c != 1 for c in third(self.row["box"], self.row)))
        if step == "one": self.pool = self.kind(noun, colour); assert self.pool == [self.target]
        if step == "many":
            self.pool, count = self.kind(noun, colour), said["count"].lower()
            assert WORDS.get(count) or int(count) > 5
            assert len(self.pool) == (WORDS.get(count) or int(count)) and self.places(said["places"], self.pool)
        if step == "row":
            self.pool, (axis, sign) = self.kind(noun, colour), {"left": (0, 1), "right": (0, -1), "top": (1, 1), "bottom": (1, -1)}[said["side"]]
            shown = [sign * middle(o["box"])[axis] for o in self.places(said["places"], self.pool)]
            assert shown == sorted(sign * middle(o["box"])[axis] for o in self.pool)[:len(shown)]
        if step == "anchor":
            fits = self.kind(noun, colour)
            if said["size"]: fits = [sorted(fits, key=lambda o: (o["box"][2] - o["box"][0]) * (o["box"][3] - o["box"][1]))[-1 if said["size"] == "largest" else 0]]
            assert len(fits) == 1 and fits[0] in self.at(*m.groups()[-2:]) and fits[0] is not self.target
            self.anchor = fits[0]
        if step == "only": assert said["count"] in (None, *WORDS, str(len(self.pool))) and WORDS.get(said["count"], len(self.pool)) == len(self.pool) and [o for o in self.pool if self.fits(o, said["what"])] == [self.target]
        if step == "holds": assert self.kind(noun, colour) == [self.target] and self.fits(self.target, said["what"])
        if step == "pick": self.check_pick(said["w1"] or said["w2"] or said["w3"], [v for v in m.groups() if v and v.isdigit()])
        if step == "decide": assert self.target in self.at(*m.groups()[-2:]) and (said["reason"] != "one that is meant" or self.last != "pick")
        self.last = step

    def check_pick(self, words, place):
        assert self.target in self.at(*place)
        ends = {"leftmost": (0, 1), "rightmost": (0, -1), "topmost": (1, 1), "bottommost": (1, -1)}
        m = re.fullmatch(rf"(?:(?P<end>{'|'.join(ends)})|(?P<size>largest|smallest)|(?P<rank>second|third|fourth) from the (?P<side>left|right|top|bottom)|one) ?(?P<what>.*)", words)
        group = [o for o in self.pool if not m["what"] or self.fits(o, m["what"])]
        assert self.target in group
        if m["end"] or m["side"]:
            axis, sign = ends[m["end"] or {"left": "leftmost", "right": "rightmost", "top": "topmost", "bottom": "bottommost"}[m["side"]]]
            rank = ("second", "third", "fourth").index(m["rank"]) + 1 if m["rank"] else 0
            keys = sorted((sign * middle(o["box"])[axis], o is self.target) for o in group)
            assert keys[rank][1] and all(b[0] - a[0] > 0.08 * self.row["width"] for a, b in zip(keys[:rank + 1], keys[1:]))
        if m["size"]:
            areas = [(o["box"][2] - o["box"][0]) * (o["box"][3] - o["box"][1]) for o in group if o is not self.target]
            mine = (self.target["box"][2] - self.target["box"][0]) * (self.target["box"][3] - self.target["box"][1])
            assert all(mine > a if m["size"] == "largest" else mine < a for a in areas)


def read(chain, row, codec):
    """The steps of a chain in order; AssertionError for a sentence that is not known or not true."""
    thought, answer = re.fullmatch(r"<think>(.*)</think><answer>(\[\d+, \d+, \d+, \d+\])</answer>", chain).groups()
    reader, steps = Reader(row, codec), []
    for sentence in re.findall(r"[^.?]+[.?](?: |$)", thought):
        step, m = next(((name, m) for name, pattern in PATTERNS.items() for m in [re.fullmatch(pattern, sentence.strip(), re.I)] if m), ("", None))
        assert m, f"unknown sentence: {sentence}"
        try: reader.check(step, m)
        except AssertionError as e: raise AssertionError(f"{row['expression']!r}: {sentence!r} in {chain} {row['objects']}") from e
        steps.append(step)
    return steps


# --- truth

@pytest.mark.parametrize("codec", [PIXELS, GRID], ids=lambda c: c.name)
def test_every_sentence_of_every_chain_is_true(rows, codec):
    drafts = rule_drafts(to_dataset(rows), codec, 0)
    steps = Counter(step for row, draft in zip(rows, drafts) if draft.completion for step in read(draft.completion, row, codec))
    assert sum(bool(d.trouble) for d in drafts) <= (3 if codec is PIXELS else 0)
    assert set(PATTERNS) - {"said"} <= set(steps) and steps["decide"] == steps["target"] == steps["look"]


@settings(max_examples=60, deadline=None)
@given(k=st.integers(0, 1199), seed=st.integers(0, 2 ** 32))
def test_other_phrasings_are_true_too(rows, k, seed):
    try: chain = write_chain(rows[k], GRID, np.random.default_rng(seed))
    except ValueError: return
    steps = read(chain, rows[k], GRID)
    assert steps[0] == "target" and steps[-1] == "decide" and 3 <= len(steps) <= 8


@pytest.mark.parametrize("spoil", [("two", "three"), ("only one", "two"), ("left", "right"), ("top", "bottom"), ("largest", "smallest"), ("above", "below"), ("red", "blue")])
def test_the_reader_of_this_file_notices_a_lie(rows, spoil):
    """Chains with one word exchanged are refused as often as they make a claim with it."""
    refused = tried = 0
    for row, draft in zip(rows, rule_drafts(to_dataset(rows), PIXELS, 0)):
        head, end, tail = draft.completion.partition("</think>")
        lie = re.sub(rf"\b{spoil[0]}\b", spoil[1], head)
        if not end or lie == head: continue
        tried += 1
        try: read(lie + end + tail, row, PIXELS)
        except AssertionError: refused += 1
    assert tried > 10 and refused > 0.95 * tried


def test_the_answer_is_the_box_and_the_last_place_lies_in_it(rows):
    for row, draft in zip(rows, rule_drafts(to_dataset(rows), PIXELS, 5)):
        if not draft.completion: continue
        parsed = parse_completion(draft.completion)
        assert parsed.box == PIXELS.encode(row["box"], row["width"], row["height"]) and iou(PIXELS.decode(parsed.box, 112, 112), row["box"]) >= 0.5
        x, y = map(int, re.findall(AT, parsed.thinking)[-1])
        assert parsed.box[0] <= x <= parsed.box[2] and parsed.box[1] <= y <= parsed.box[3] and not FORBIDDEN.search(parsed.thinking)


def test_nearly_every_sentence_of_the_scenes_can_be_resolved(rows):
    meant = ["that is meant" in d.completion for d in rule_drafts(to_dataset(rows), PIXELS, 0)]
    assert np.mean(meant) < 0.03


# --- objects not known

CLAIM = re.compile(r"\b(?:only|there (?:is|are)|one of|first|second|third|leftmost|rightmost|topmost|bottommost|largest|smallest) ?\b", re.I)


def test_without_objects_nothing_is_said_of_other_objects(rows):
    for row, draft in zip(rows, rule_drafts(to_dataset([{**r, "objects": None} for r in rows]), GRID, 0)):
        thought = parse_completion(draft.completion).thinking
        sentences = re.findall(r"[^.?]+[.?](?: |$)", thought)
        assert len(re.findall(AT, thought)) == 1 and re.search(AT, sentences[-1])
        for sentence in sentences:
            if "compare it with" in sentence or "check it against" in sentence or re.match(r"(?:First I look|Cue|The cue|Its cue)|The sentence says|\"|As the sentence", sentence): continue
            assert not CLAIM.search(sentence), sentence


def test_real_crops_are_written_whole(shared):
    for name, part in load_folder(shared / "aerial_mini")[0].items():
        for codec in (Codec("qwen2_5_vl"), GRID):
            drafts = rule_drafts(part, codec, 0)
            for row, draft in zip(part.remove_columns("image"), drafts):
                parsed = parse_completion(draft.completion)
                assert draft.trouble == "" and parsed.box == codec.encode(row["box"], row["width"], row["height"]) and not FORBIDDEN.search(parsed.thinking)
                assert any(w in parsed.thinking for w in ("car", "vehicle", "bus", "tree"))


def test_long_sentences_over_maps_are_written_or_refused_with_a_reason(shared):
    for part in load_folder(shared / "rsvg_hr")[0].values():
        drafts = rule_drafts(part, GRID, 0)
        assert all("leaves the image" in d.trouble for d in drafts if not d.completion) and sum(bool(d.trouble) for d in drafts) <= 4


# --- phrasing

def test_every_step_has_three_phrasings_and_all_of_them_are_used(rows):
    assert all(len(texts) == len(set(texts)) >= 3 for texts in TEXTS.values())
    cars = [dict(expression="the car on the left", category="car", box=[90, 5, 100, 15], width=112, height=112, expression_id=str(k)) for k in range(40)]
    drafts = rule_drafts(to_dataset([*rows, *[{**r, "objects": None} for r in rows], *cars]), GRID, 0)
    told = "\n".join(d.completion for d in drafts)
    for step, texts in TEXTS.items():
        for text in texts:
            pattern = "".join(f"[^<>\n]+" if part.startswith("{") else re.escape(part) for part in re.split(r"(\{\w+\})", text))
            assert re.search(pattern, told, re.I), (step, text)


def test_a_row_keeps_its_chain_in_any_subset_and_order(rows):
    some = to_dataset(rows[:40])
    drafts = dict(zip(some["expression_id"], rule_drafts(some, PIXELS, 7)))
    again = some.select([30, 3, 12])
    assert rule_drafts(again, PIXELS, 7) == [drafts[name] for name in again["expression_id"]]
    assert rule_drafts(some, PIXELS, 8) != list(drafts.values()) and RULE_VERSION


def test_a_place_is_written_in_the_frame_of_the_student():
    row = dict(expression="the bridge", box=[200, 400, 400, 600], width=800, height=800, category="bridge", expression_id="a")
    for codec, place, box in ((Codec("qwen2_5_vl"), "(304, 508)", "[203, 406, 406, 609]"), (GRID, "(375, 625)", "[250, 500, 500, 750]")):
        chain = write_chain(row, codec, np.random.default_rng(0))
        assert place in chain and box in chain


# --- what a sentence says and what is found

def one(expression, box=(40, 40, 60, 60), category="car", **more): return dict(expression=expression, box=list(box), width=112, height=112, category=category, expression_id="x", **more)


def chain_of(row): return write_chain(row, PIXELS, np.random.default_rng(0))


@pytest.mark.parametrize("seed", range(6))
def test_a_position_that_the_box_refutes_is_quoted_and_not_found(seed):
    for objects in (None, [dict(category="car", colour=None, box=[90.0, 5, 100, 15]), dict(category="car", colour=None, box=[5.0, 5, 15, 15])]):
        chain = write_chain(one("the car on the left", (90, 5, 100, 15), objects=objects), PIXELS, np.random.default_rng(seed))
        assert '"on the left"' in chain and "top right" in chain and chain.count("left") == 1


def thing(category, colour, *box): return dict(category=category, colour=colour, box=[float(v) for v in box])


CAR, BUS, TRUCK = thing("car", "blue", 40, 40, 60, 60), thing("bus", None, 90, 40, 110, 60), thing("truck", None, 3, 40, 20, 60)


@pytest.mark.parametrize("expression, objects", [
    ("the vehicle left of the bus", [CAR, BUS, thing("car", None, 90, 10, 99, 19)]), ("the car between the bus and the truck", [CAR, thing("car", None, 5, 5, 15, 15), BUS, TRUCK]),
    ("the car left of the red car", [CAR, thing("car", "red", 80, 40, 100, 60)]), ("the car right of the truck and left of the bus", [CAR, BUS, TRUCK]),
    ("the car nearest to the bottom right corner", [CAR, thing("car", None, 3, 3, 13, 13)]), ("the car left of the bus", [CAR, CAR, BUS]), ("the one in the middle", None), ("the one near the bus", [CAR, BUS]),
    ("the fifth car from the left", [CAR, thing("car", None, 3, 3, 13, 13)]), ("the middle car of the three", [CAR, thing("car", None, 3, 40, 20, 60), thing("car", None, 90, 40, 110, 60)]), ("both cars, not the red ones", None)])
def test_no_phrasing_can_be_read_as_a_claim_about_another_object(expression, objects):
    """Two objects of one kind, several anchors, an `it` after an anchor: the filters of chapter 05b, which read all of it, have nothing to say."""
    for category in ("car", None) if objects is None else ("car",):
        row = one(expression, category=category, objects=objects)
        for seed in range(60): assert find_faults(write_chain(row, PIXELS, np.random.default_rng(seed)), row, PIXELS) == []


def test_a_colour_that_the_sentence_denies_is_not_given_to_the_target():
    assert "red" not in chain_of(one("the car that is not red", objects=[CAR, thing("car", "red", 80, 80, 90, 90)]))


def test_a_sentence_without_a_noun_speaks_of_an_object():
    chain = chain_of(one("the one on the left", (3, 40, 23, 60), category=None))
    assert "the object" in chain and "the one" not in chain


def test_a_cue_of_an_anchor_is_said_once():
    chain = chain_of(one("the car left of the largest red building"))
    assert chain.count("largest") <= 2 and "left of the largest red building" in chain


@pytest.mark.parametrize("expression, category, said", [("Das rote Haus in Zürich", "building", "building"), ("北京的桥", None, "北京的桥"), ("The gizmo", None, "gizmo"), ("three adjacent tennis courts", None, "group of adjacent tennis courts")])
def test_what_is_not_understood_is_called_by_its_category_or_repeated(expression, category, said):
    chain = chain_of(one(expression, category=category))
    assert said in chain and parse_completion(chain).reason == "ok"


@settings(max_examples=150, deadline=None)
@given(st.text(max_size=60))
def test_any_text_gives_a_chain_or_a_reason(text):
    try: chain = chain_of(one(text, category=None))
    except ValueError as e: assert "row 'x'" in str(e) and "expression" in str(e); return
    assert parse_completion(chain)[:2] == ((40, 40, 60, 60), "ok") and chain.count("<") == 4


# --- limits

@pytest.mark.parametrize("row, words", [
    (one("the car", (40.6, 40, 41.4, 50)), "has no area in whole numbers of the frame 112x112"), (one("the car", (100, 40, 130, 60)), "leaves the image 112x112"), (one("the car", (60, 40, 40, 60)), "has no area"),
    (one("the car", (40.6, 40, 41.6, 42.4)), "keeps an IoU"), (one("the car", (1, 2, float("inf"), 4)), "not finite"), (one(" "), "expression is empty"), (one(None), "expression is empty"), (one("<answer>", category=None), "signs"),
    (one("the car", objects=[]), "objects"), (one("the car", objects=[dict(category=None, colour=None, box=[40.0, 40, 60, 60])]), "no category"), (one("the car", objects=[dict(category="car", colour="red", box=[1.0, 2, 3, 4])]), "objects"), ({**one("the car"), "width": None}, "width"), ({**one("the car"), "height": 90000}, "90000")])
def test_rows_that_allow_no_chain_say_why(row, words):
    with pytest.raises(ValueError, match="row 'x'") as caught: write_chain(row, PIXELS, np.random.default_rng(0))
    assert words in str(caught.value)
    if row["width"]: assert rule_drafts(to_dataset([row]), PIXELS, 0) == [Draft(trouble=str(caught.value))]


def test_a_box_at_the_edge_and_odd_sides_are_fine():
    row = {**one("the car", (0, 0, 33, 25)), "width": 641, "height": 479}
    for codec in (Codec("qwen2_5_vl"), GRID): assert "top left" in write_chain(row, codec, np.random.default_rng(0))


def test_two_equal_boxes_give_no_order():
    twins = [dict(category="car", colour=c, box=[40.0, 40, 60, 60]) for c in ("red", "blue")]
    chain = chain_of(one("the leftmost car", objects=twins))
    assert "leftmost one" not in chain and "wo cars" in chain


def test_two_anchors_are_both_called_by_name():
    things = [("car", "red", [40.0, 40, 60, 60]), ("car", "blue", [5.0, 98, 15, 108]), ("building", "white", [90.0, 42, 110, 62]), ("bridge", "black", [42.0, 80, 62, 100])]
    chain = chain_of(one("the car on the left of the building and it is above the bridge", objects=[dict(category=n, colour=c, box=b) for n, c, b in things]))
    assert re.search(r"one (?:of the two )?is on the left of the building and above the bridge|One is on the left of the building and above the bridge", chain)


def test_colours_that_are_not_known_are_not_claimed():
    cars = [dict(category="car", colour=c, box=b) for c, b in (("red", [40.0, 40, 60, 60]), (None, [80.0, 80, 90, 90]))]
    assert "that is meant" in chain_of(one("the red car", objects=cars))


def test_rows_without_optional_columns_are_written():
    assert parse_completion(chain_of({k: v for k, v in one("the car on the right").items() if k not in ("category", "expression_id")})).reason == "ok"


def test_drafts_do_not_open_images_and_leave_the_rows_alone(tmp_path):
    rows = to_dataset([dict(one("the car"), image=str(tmp_path / "missing.png"), image_id="a")])
    before = split_hash(rows)
    assert rule_drafts(rows, PIXELS, 0)[0].completion and split_hash(rows) == before and rule_drafts(rows.select([]), PIXELS, 0) == []
