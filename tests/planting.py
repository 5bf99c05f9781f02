"""Thoughts with one known defect each, made by construction of their fields; used by the tests
and by benchmark_chains.py."""
from copy import deepcopy

from rsground_nb.boxes import iou
from rsground_nb.cot import Candidate, Cue, make_thought, render
from rsground_nb.cues import outcomes
from rsground_nb.filters import find_faults, verdict

PLANTED = ("ok", "no_thought", "no_box", "outside", "wrong_frame", "wrong_box", "leak", "wrong_anchor",
           "misread", "wrong_candidate", "missing_candidate", "wrong_outcome", "wrong_decision")
LEAKS = ("The given box confirms this.", "As annotated, this is the one.", "I was told where it is.",
         "The prompt lists these coordinates.", "I must not mention the ground truth.")
ELSEWHERE = ("nowhere", "leftmost", "rightmost", "topmost", "bottommost", "largest", "smallest", "top left",
             "bottom half", "green")


def pick(rng, things): return things[int(rng.integers(len(things)))] if things else None


def outside(thought, row, rng):
    x1, y1, x2, y2 = thought.box
    dx, dy = pick(rng, [(row["width"], 0), (0, row["height"]), (-x2, 0), (0, -y2)])
    thought.box = [x1 + dx, y1 + dy, x2 + dx, y2 + dy]
    return thought


def wrong_frame(thought, row, rng):
    (x1, y1, x2, y2), sides = thought.box, (row["width"], row["height"]) * 2
    thought.box = pick(rng, [[1000 * v / s for v, s in zip(thought.box, sides)],
                             [v / s for v, s in zip(thought.box, sides)], [y1, x1, y2, x2],
                             [x1, y1, x2 - x1, y2 - y1]])
    x1, y1, x2, y2 = thought.box
    return thought if x1 < x2 and y1 < y2 and iou(thought.box, row["box"]) < 0.4 else None


def wrong_box(thought, row, rng):
    x1, y1, x2, y2 = thought.box
    for _ in range(50):
        dx, dy = rng.uniform(-1, 1, 2) * (row["width"], row["height"])
        new = [x1 + dx, y1 + dy, x2 + dx, y2 + dy]
        if (min(new) >= 0 and new[2] <= row["width"] and new[3] <= row["height"]
            and iou(new, row["box"]) < 0.3):
            thought.box = new
            return thought


def wrong_anchor(thought, row, rng):
    """Another earlier step, no step at all, or another object of the anchor's category."""
    k = pick(rng, [k for k, step in enumerate(thought.steps) if step.anchors])
    if k is None: return None
    step, (mine,) = thought.steps[k], thought.steps[k].anchors
    others = [[], *([j] for j in range(k) if j != mine and len(thought.steps[j].left) == 1)]
    step.anchors = pick(rng, others)
    return thought


def misread(thought, row, rng):
    if thought.cues and rng.random() < 0.3:
        del thought.cues[int(rng.integers(len(thought.cues)))]
        return thought
    word = pick(rng, [w for w in ELSEWHERE if not set(w.split()) <= set(row["expression"].split())])
    way = rng.random()
    if way < 0.5: thought.cues.append(Cue("position", word))
    elif way < 0.75: thought.target.attributes.append(word)
    else: thought.target.category = "windmill"
    return thought


def wrong_candidate(thought, row, rng):
    k, j = pick(rng, [(k, j) for k, step in enumerate(thought.steps) for j in range(len(step.candidates))
                      if not (k == len(thought.steps) - 1 and j == thought.decision)]) or (None, None)
    way = rng.random()
    free = [[x, y, x + 9.0, y + 9.0] for x in range(0, row["width"] - 9, 12)
            for y in range(0, row["height"] - 9, 12)]
    free = [box for box in free if not any(iou(box, o["box"]) for o in row["objects"])]
    if way < 0.3 or k is None:
        step = pick(rng, thought.steps)
        if not free: return None
        step.candidates.append(Candidate(step.find.category, None, pick(rng, free)))
        return thought
    it = thought.steps[k].candidates[j]
    if way < 0.55 and free: it.box = pick(rng, free)
    elif way < 0.8:
        it.category = next(c for c in ("ship", "windmill") if c != it.category
                           and not any(o["category"] == c and iou(o["box"], it.box) for o in row["objects"]))
    else: it.colour = next(c for c in ("red", "blue") if c != it.colour)
    return thought


def missing_candidate(thought, row, rng):
    """Left out of every step that has it, so that the Thought agrees with itself."""
    k, j = pick(rng, [(k, j) for k, step in enumerate(thought.steps)
                      for j in range(len(step.candidates)) if j not in step.left]) or (None, None)
    if k is None: return None
    step = thought.steps[k]
    del step.candidates[j]
    step.left = [i - (i > j) for i in step.left]
    if step is thought.steps[-1]: thought.decision = step.left[0]
    return thought


def wrong_outcome(thought, row, rng):
    """One survivor is exchanged for a candidate that the cue surely does not fit."""
    found = []
    for k, step in enumerate(thought.steps):
        if not step.cue: continue
        anchors = [thought.steps[a].candidates[thought.steps[a].left[0]].box for a in step.anchors]
        truth = outcomes(step.cue, [c.box for c in step.candidates], anchors, (row["width"], row["height"]))
        found += [(k, j) for j, holds in enumerate(truth) if holds is False]
    k, j = pick(rng, found) or (None, None)
    if k is None: return None
    thought.steps[k].left = [j, *thought.steps[k].left[1:]]
    if k == len(thought.steps) - 1: thought.decision = j
    return thought


def wrong_decision(thought, row, rng):
    others = [j for j in range(len(thought.steps[-1].candidates)) if j != thought.decision]
    thought.decision = pick(rng, others)
    return thought if others else None


FIELDS = dict(ok=lambda thought, row, rng: thought, outside=outside, wrong_frame=wrong_frame,
              wrong_box=wrong_box, wrong_anchor=wrong_anchor, misread=misread,
              wrong_candidate=wrong_candidate,
              missing_candidate=missing_candidate, wrong_outcome=wrong_outcome, wrong_decision=wrong_decision)


def plant(code, row, codec, rng):
    """(completion, Thought) with that one defect; None if the row cannot have it."""
    thought = FIELDS.get(code, FIELDS["ok"])(deepcopy(make_thought(row, codec)), row, rng)
    if not thought: return None
    text = render(thought, codec, row["width"], row["height"])
    if code == "no_thought": text = text[text.index("<answer>"):]
    if code == "no_box":
        text = (text[:text.index("</think>") - int(rng.integers(5))] if rng.random() < 0.5
                else text.replace("<answer>", "").replace("</answer>", ""))
    if code == "leak": text = text.replace("<think>", f"<think>{pick(rng, LEAKS)} ")
    return text, thought


def planted(rows, codec, rng, codes=PLANTED):
    """(code, row, completion, Thought) for each row: the codes in turn; the next one
    where a row cannot have it."""
    waiting = []
    for row in rows:
        waiting += [code for code in codes if code not in waiting] if not waiting else []
        for code in [*waiting, *codes]:
            made = plant(code, row, codec, rng)
            if made:
                if code in waiting: waiting.remove(code)
                yield code, row, *made
                break


def scores(truth, found):
    """{verdict: (planted, found, recall, precision)}"""
    table = {}
    for name in dict.fromkeys([*truth, *found]):
        both, n, m = sum(t == f == name for t, f in zip(truth, found)), truth.count(name), found.count(name)
        table[name] = (n, m, both / max(n, 1), both / max(m, 1))
    return table


def judged(rows, codec, rng):
    """(planted codes, verdicts, the lines that differ)."""
    lines = list(planted(rows, codec, rng))
    found = [verdict(find_faults(text, row, codec, thought=thought)) for _, row, text, thought in lines]
    return [line[0] for line in lines], found, [(line, f) for line, f in zip(lines, found) if line[0] != f]
