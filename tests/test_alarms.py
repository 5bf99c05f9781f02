"""`rsground train doctor`: real GRPO runs of the tiny model that fail in each way, their logs in all three
formats, the committed healthy logs, and files that are no log."""
import json
import re

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, strategies as st
from transformers import PrinterCallback
from trl import GRPOConfig, GRPOTrainer

from conftest import ROOT
from rsground_nb.alarms import examine_log, gradient_zero, lasting, read_log, term_table, trend
from rsground_nb.data import to_dataset
from rsground_nb.model import DIRECT, adapt, load_tiny, to_prompt
from rsground_nb.rewards import text_of
from rsground_nb.run import main
from rsground_nb.scale import start
from rsground_nb.scenes import scene_records
from rsground_nb.train import never_drawn


def near_reward(completions, wanted, **columns):
    """1 minus the distance of the first number from the wanted one, both as shares of the image's width."""
    found = [re.match(r"\[(\d+)", text_of(c)) for c in completions]
    return [1 - min(1, abs(int(f[1]) / 1000 - w)) if f else 0.0 for f, w in zip(found, wanted)]


def format_reward(completions, **columns): return [float(text_of(c).endswith("]")) for c in completions]


def lost_reward(completions, **columns): return [0.0] * len(completions)  # say, boxes in the wrong unit


def half_reward(completions, **columns): return [0.5] * len(completions)


def rounded_reward(completions, **columns): return [0.6] * len(completions)  # not the mean in 32 bits


def questions(wanted, seed=0):
    """Two questions; the first number of the answer should be `wanted`, a share of the width."""
    rows = list(scene_records(2, seed))
    kept = to_dataset(rows).select_columns(["image"]).add_column("wanted", [wanted] * 2)
    return kept.add_column("prompt", [to_prompt(r["expression"], DIRECT) for r in rows])


@pytest.fixture(scope="module")
def tiny():
    model, processor = load_tiny()
    return model, processor, {n: w.clone() for n, w in model.state_dict().items()}


def train(tiny, folder, rewards=near_reward, held_out=None, **changed):
    """A run of TRL's own trainer; returns the path of its trainer_state.json."""
    model, processor, weights = tiny
    start(0)
    model.load_state_dict(weights)
    usual = dict(output_dir=str(folder), max_steps=2, per_device_train_batch_size=16, num_generations=8,
                 max_completion_length=24, learning_rate=1e-3, lr_scheduler_type="constant", logging_steps=1,
                 save_strategy="no", report_to="none", use_cpu=True, bf16=False, disable_tqdm=True, seed=0,
                 activation_checkpointing=False,
                 generation_kwargs=dict(suppress_tokens=never_drawn(processor)))
    trainer = GRPOTrainer(model=model, reward_funcs=rewards, args=GRPOConfig(**{**usual, **changed}),
                          train_dataset=questions(0.6), eval_dataset=held_out, processing_class=processor,
                          peft_config=adapt(model, 0))
    trainer.remove_callback(PrinterCallback)
    trainer.train()
    trainer.state.save_to_json(str(folder / "trainer_state.json"))
    return folder / "trainer_state.json"


def told(log):
    """The names of the alarms, and of the remarks, of a log with one run."""
    (run,) = read_log(log)
    symptoms, _ = examine_log(run)
    return {s.name for s in symptoms if s.alarm}, {s.name for s in symptoms if not s.alarm}


LONGER = dict(max_steps=24, learning_rate=1e-3, lr_scheduler_type="linear", eval_strategy="steps",
              eval_steps=8, eval_on_start=True, per_device_eval_batch_size=16)


@pytest.mark.parametrize("fault, alarms", [
    (dict(rewards=half_reward), {"groups without signal", "gradient zero"}),
    (dict(rewards=rounded_reward), {"groups without signal"}),
    (dict(max_completion_length=5), {"truncation"}),
    (dict(max_completion_length=5, mask_truncated_completions=True), {"truncation", "gradient zero"}),
    (dict(temperature=1e-4), {"entropy gone", "groups without signal", "gradient zero"}),
    (dict(num_iterations=4, beta=1e-4, learning_rate=1e-2, max_steps=4), {"clip"}),
    (dict(beta=1e-4, learning_rate=1e-2, max_steps=4),  # far from the reference, and nothing works any more
     {"KL", "groups without signal", "truncation", "a reward that nobody earns"}),
    (dict(beta=0.04, learning_rate=1e-9, max_steps=8), {"KL"}),
    (dict(rewards=[format_reward, lost_reward], temperature=2.0),
     {"format only", "a reward that nobody earns", "truncation"}),
    (dict(rewards=[near_reward, format_reward], reward_weights=[1.0, 0.01], temperature=2.0),
     {"a reward that cannot be heard", "truncation"}),
], ids=lambda case: None)
def test_a_run_that_fails_is_told_why(tiny, tmp_path, fault, alarms):
    assert told(train(tiny, tmp_path, **fault))[0] == alarms


@pytest.fixture(scope="module")
def healthy(tiny, tmp_path_factory):
    return train(tiny, tmp_path_factory.mktemp("healthy"), held_out=questions(0.6), **LONGER)


def test_a_healthy_run_raises_no_alarm(healthy, capsys):
    assert main(["train", "doctor", str(healthy)]) == 0
    said = capsys.readouterr().out
    assert "24 logged steps, 1 to 24" in said and "it rises" in said
    assert said.endswith("Not checked: KL (no kl).\nalarms: 0\n")


def test_a_reward_that_rises_on_training_questions_only(tiny, tmp_path, capsys):
    log = train(tiny, tmp_path, held_out=questions(0.6, seed=1), **LONGER)  # all weights, two questions
    assert told(log)[0] == {"not on held-out questions", "truncation"}  # late answers do get longer
    assert main(["train", "doctor", str(log)]) == 1 and "alarms: 2" in capsys.readouterr().out


def test_the_three_formats_say_the_same(healthy, tmp_path, capsys):
    rows = json.loads(healthy.read_text())["log_history"]
    csv, lines = tmp_path / "log.csv", tmp_path / "log.jsonl"
    pd.DataFrame(rows).to_csv(csv, index=False)
    lines.write_text("".join(json.dumps(row) + "\n" for row in rows))
    (first,) = read_log(healthy)
    for path in (csv, lines): pd.testing.assert_frame_equal(read_log(path)[0], first, check_like=True)
    assert {"eval_reward", "entropy", "grad_norm", "rewards/near_reward/std"} <= set(first.columns)


# the committed logs

@pytest.mark.parametrize("name, quiet", [("shipped", {"a reward that cannot be heard"}),
                                         ("benchmark", set())])
def test_the_committed_logs_raise_no_alarm_but_that_of_the_quiet_reward(name, quiet, capsys):
    path = ROOT / "tests" / f"{name}_grpo_log.csv"
    runs = [examine_log(run)[0] for run in read_log(path)]
    assert len(runs) == 5
    alarms = [s.name for found in runs for s in found if s.alarm]
    assert set(alarms) <= quiet and {s.name for found in runs for s in found} <= quiet | {"clip"}
    assert main(["train", "doctor", str(path)]) == int(bool(alarms))
    assert capsys.readouterr().out.count("run 5 of 5") == 1


def test_the_quiet_reward_of_the_shipped_runs_is_the_one_of_weight_a_tenth():
    for run in read_log(ROOT / "tests" / "shipped_grpo_log.csv"):
        table = term_table(run)
        np.testing.assert_allclose(table.weight, [1, 1, 0.1], atol=1e-3)  # REWARD_WEIGHTS
        assert table.share["iou_reward"] > 0.9 and 0.005 < table.share["positional_reward"] < 0.015


# files that are no log

ANYTHING = st.none() | st.booleans() | st.integers() | st.floats() | st.text() | st.lists(st.integers())
GOOD = '{"step": 1, "reward": 0.5}\n'


@pytest.mark.parametrize("text, says", [
    ("", "LOG: the file is empty"), ("\n \n", "LOG: the file is empty"),
    ("step,reward\n", "LOG: no step was logged"), ('{"log_history": []}', "LOG: no step was logged"),
    ("step,loss\n1,0.5\n2,0.4\n", "LOG, line 2 to line 3: no column reward"),
    ("epoch,reward\n1,0.5\n", "LOG, line 2: no step"),
    ("step,reward\n1,0.5\n2,0.5,7\n", "LOG, line 3: not as many cells as the header has names"),
    ("step,reward\n1,0.5\n\n2,good\n", "LOG, line 4: reward is not a number: 'good'"),
    ("step,reward,grad_norm\n1,0.5,1\n2,0.5,nan\n", "LOG, line 3: grad_norm is not a finite number"),
    (GOOD + '{"step": 2, "reward": NaN}\n', "LOG, line 2: reward is not a finite number"),
    (GOOD + '{"step": 2, "rew\n', "LOG, line 2: not JSON"), (GOOD + "all well\n", "LOG, line 2: not JSON"),
    (GOOD + "[1, 2]\n", "LOG, line 2: not as many cells"),
    (GOOD + "7\n", "LOG, line 2: not a row of a log: 7"),
    (GOOD + '{"reward": 0.5}\n', "LOG, line 2: no step"),
    ('{"log_history": [{"step": 1, "reward": 1}, {"step": 2, "reward": Infinity}]}',
     "LOG, log_history entry 2: reward is not a finite number"),
    ('{\n"a": 1,\n}\n', "LOG: not JSON (Expecting property name enclosed in double quotes, line 3"),
    ('{\n"architectures": []\n}\n', "LOG: no log_history: not a trainer_state.json"),
    ("[" * 100_000, "LOG: nested too deeply"), ("What a fine day.\nThe end.\n", "LOG, line 2: no step")])
def test_a_file_that_is_no_log_is_one_sentence_with_its_line(tmp_path, capsys, text, says):
    path = tmp_path / "log"
    path.write_text(text)
    assert main(["train", "doctor", str(path)]) == 2
    out, err = capsys.readouterr()
    assert err.startswith(f"rsground: {says.replace('LOG', str(path))}") and err.count("\n") == 1 and not out


@pytest.mark.parametrize("name, says", [("no/such.csv", "not found"), (".", "not a plain file"),
                                        ("picture.png", "not UTF-8")])
def test_a_path_that_is_no_text_file(tmp_path, monkeypatch, capsys, name, says):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "picture.png").write_bytes(b"\x89PNG\r\n\x1a\n\xff")
    assert main(["train", "doctor", name]) == 2
    assert capsys.readouterr().err.startswith(f"rsground: {name}: {says}")


@given(st.text() | st.lists(st.dictionaries(st.sampled_from(["step", "reward", "kl", "x"]), ANYTHING)).map(
    lambda rows: "\n".join(map(json.dumps, rows))))
def test_no_text_is_more_than_refused(tmp_path_factory, text):
    path = tmp_path_factory.getbasetemp() / "any.log"
    path.write_text(text, encoding="utf-8", errors="replace")
    assert main(["train", "doctor", str(path)]) in (0, 1, 2)


# what the checks compute

@given(st.lists(st.sampled_from([0.0, 0.25, 1.0]), min_size=1, max_size=24))
def test_lasting_is_the_longest_end_whose_quarters_are_all_bad(values):
    size, n = max(1, len(values) // 4), len(values)
    bad = [sum(values[k:k + size]) / size >= 0.5 for k in range(n - size + 1)]
    first = next((k for k in range(len(bad)) if all(bad[k:])), None)
    found = lasting(pd.Series(values), lambda means: means >= 0.5)
    assert (None if found is None else list(found)) == (None if first is None else values[first:])


@given(st.permutations(range(12)))
def test_a_trend_ignores_the_scale_and_turns_with_time(values):
    values = pd.Series(values, dtype=float)
    assert trend(values) == pytest.approx(trend(np.exp(values))) == pytest.approx(-trend(values[::-1]))
    assert abs(trend(values)) <= 11 ** 0.5 + 1e-9 and trend(values[:7]) == 0 == trend(values * 0)


def test_chance_rarely_looks_like_a_rise():
    draws = np.random.default_rng(0).normal(size=(2000, 40))
    assert np.mean([trend(pd.Series(row)) >= 2.5 for row in draws]) < 0.01


@given(st.lists(st.floats(0.05, 2), min_size=3, max_size=3))
def test_weights_are_read_off_the_log(weights):
    draws = np.random.default_rng(0).uniform(size=(16, 6))
    log = pd.DataFrame({f"rewards/{n}/{of}": draws[:, 2 * k + j] for k, n in enumerate("abc")
                        for j, of in enumerate(("mean", "std"))})
    table = term_table(log.assign(reward=draws[:, ::2] @ np.array(weights)))
    np.testing.assert_allclose(table.weight, weights, rtol=1e-3, atol=1e-3)
    spread = np.array(weights) ** 2 * (draws[-4:, 1::2] ** 2).mean(0)
    np.testing.assert_allclose(table.share, spread / spread.sum(), rtol=1e-2)


def test_a_step_below_the_one_before_begins_another_run(tmp_path):
    path = tmp_path / "log.csv"
    path.write_text("step,reward,seed\n1,0,a\n2,0,a\n1,1,b\n2,1,b\n2,,b\n1,,c\n")  # the last has no reward
    assert [list(run.index) for run in read_log(path)] == [[1, 2], [1, 2, 2]]


def test_a_gradient_of_zero_between_generations_has_the_cause_of_its_generation():
    log = pd.DataFrame(dict(grad_norm=0.0, frac_reward_zero_std=[1, None] * 4), index=range(1, 9))
    (found,) = gradient_zero(log)
    assert "no group had two different rewards" in found.text and (found.first, found.last) == (1, 8)
