"""`rsground train`: files, names, refusals, real trainings of the tiny model, and the same
weights however a step is cut."""
import os
import re
import subprocess
import sys
from pathlib import Path

import pandas as pd
import pytest
import torch
import yaml
from accelerate.commands.config.config_args import load_config_from_file
from accelerate.utils import DistributedType
from safetensors.torch import load_file
from transformers import Qwen2_5_VLConfig

import launch_worker
import rsground_nb.launch as launch
from rsground_nb.data import write_jsonl
from rsground_nb.launch import (CONFIGS, QWEN_3B, STAGES, is_finished, kept_settings, parse_settings, plan,
                                plan_line)
from rsground_nb.model import load_vlm
from rsground_nb.run import main
from rsground_nb.scale import locked
from rsground_nb.scenes import scene_records

TRAININGS = sorted(p for p in CONFIGS.glob("*.yaml") if not p.stem.endswith("_segment"))
LAUNCHERS = sorted(p for p in (CONFIGS / "accelerate").glob("*.yaml"))
SHORT = ("--max_steps 2 --logging_steps 1 --disable_tqdm true --learning_rate 1e-4 --lr_scheduler_type "
         "constant --warmup_steps 0 --save_strategy no".split())


def stage_of(path): return path.stem.split("_")[-1]


def parsed(path, *words):
    return parse_settings(stage_of(path), ["--config", path, "--use_cpu", "true", *words])


def weights(folder): return load_file(Path(folder) / "model" / "model.safetensors")


def apart(one, other):
    """The largest difference of two trained models."""
    one, other = weights(one), weights(other)
    assert one.keys() == other.keys()
    return max((one[k].float() - other[k].float()).abs().max().item() for k in one)


@pytest.mark.parametrize("path", TRAININGS, ids=lambda p: p.stem)
def test_a_ready_file_is_read_by_trl_and_names_nothing_else(path):
    data, training, model = parsed(path)
    for name, value in yaml.safe_load(path.read_text()).items():
        found = next(getattr(part, name) for part in (data, training, model) if hasattr(part, name))
        if name != "use_cpu" and not hasattr(found, "value") and not isinstance(found, list):
            assert found == value, name
    assert data.dataset_name and model.use_peft and model.lora_alpha == 2 * model.lora_r


@pytest.mark.parametrize("path", TRAININGS, ids=lambda p: p.stem)
def test_the_figures_in_a_ready_file_are_the_plan(path):
    """Worked out anew for one file; the chapter itself does it for all six, in every run."""
    if "qwen" not in path.stem: assert "GiB" not in path.read_text()
    elif path.stem == "qwen_24gb_grpo":
        line = plan_line(plan(Qwen2_5_VLConfig(**QWEN_3B), *parsed(path)))
        assert f"# GiB per GPU: {line}\n" in path.read_text(), (
            "write the comment anew, or find out why the plan changed")


def test_the_three_machines_train_on_the_same_step():
    for stage, rows in (("sft", 16), ("grpo", 64)):
        for machine, processes in (("24gb", 1), ("80gb", 1), ("8gpus", 8)):
            _, training, _ = parsed(CONFIGS / f"qwen_{machine}_{stage}.yaml")
            assert (training.per_device_train_batch_size * training.gradient_accumulation_steps * processes
                    == rows), (machine, stage)
            if stage == "grpo": assert training.per_device_train_batch_size % training.num_generations == 0


@pytest.mark.parametrize("path", LAUNCHERS, ids=lambda p: p.stem)
def test_a_launcher_file_is_read_by_accelerate(path):
    found = load_config_from_file(str(path))
    kind = {"ddp": "MULTI_GPU", "cpu": "MULTI_GPU", "fsdp": "FSDP", "zero2": "DEEPSPEED",
            "zero3": "DEEPSPEED"}[path.stem.split("_")[0]]
    assert (found.distributed_type == DistributedType(kind) and found.num_processes
            == (2 if "cpu" in path.stem else 8) and found.use_cpu == ("cpu" in path.stem))
    if kind == "DEEPSPEED": assert found.deepspeed_config["zero_stage"] == int(path.stem[4])
    if kind == "FSDP": assert found.fsdp_config["fsdp_version"] == 2


@pytest.mark.parametrize("words, message", [
    ("grpo --config no/such.yaml", "no/such.yaml"),
    ("grpo --config tiny_grpo.yaml --lerning_rate 1",
     "unknown setting --lerning_rate: did you mean --learning_rate?"),
    ("grpo --config tiny_grpo.yaml --max_pixels 3", "max_pixels 3: at least 3136"),
    ("sft --config tiny_sft.yaml --scale smokey", "unknown scale 'smokey'"),
    ("sft --config tiny_sft.yaml --scenes_seed -1", "scenes_seed -1"),
    ("sft --config POINT", "max_steps 3.5: a whole number is needed"),
    ("sft --config ALIAS", "line 2: YAML with aliases"), ("sft --config MERGE", "merges (<<)"),
    ("grpo --config BAD", "lerning_rate"), ("sft --config BROKEN", "BROKEN.yaml"),
    ("sft --config tiny_sft.yaml --max_steps many", "invalid int value: 'many'"),
    ("sft --dataset_name scenes", "--max_pixels"),
    ("sft --config tiny_sft.yaml --use_cpu false --bf16 true", "use_cpu"),
    ("sft --config tiny_sft.yaml --chains no/chains", "no/chains is not a finished folder of chains"),
    ("sft --config tiny_sft.yaml --resume_from_checkpoint true", "holds no complete checkpoint"),
    ("sft --config tiny_sft.yaml --split prod", "no split 'prod': use one of train, val, test"),
    ("sft --config tiny_sft.yaml --data no/such/folder", "no/such/folder is not a folder"),
    ("grpo --config tiny_grpo.yaml", "model_name_or_path runs/tiny-sft/model: no folder with a model here"),
    ("grpo --config tiny_grpo.yaml --model_name_or_path tiny --third best", "unknown reward 'best'"),
    ("grpo --config tiny_grpo.yaml --num_generations 5", "divisible by num_generations"),
    ("grpo --config tiny_grpo.yaml --model_name_or_path tiny --per_device_train_batch_size 4 "
     "--gradient_accumulation_steps 2", "share_prompt="),
    ("grpo --config tiny_grpo.yaml --model_name_or_path tiny --use_vllm true", "vLLM is not available"),])
def test_a_mistake_is_one_sentence_and_exit_code_2(tmp_path, monkeypatch, capsys, words, message):
    if "bf16" in words and torch.cuda.is_available(): pytest.skip("this machine has a GPU")
    monkeypatch.chdir(tmp_path)
    Path("BAD.yaml").write_text((CONFIGS / "tiny_grpo.yaml").read_text() + "lerning_rate: 1\n")
    texts = dict(BROKEN="max_steps: [1\n", ALIAS="a: &a [1]\nb: [*a, *a]\n",
                 MERGE="max_steps: 1\n<<: {seed: 1}\n",
                 POINT=(CONFIGS / "tiny_sft.yaml").read_text().replace("max_steps: 100", "max_steps: 3.5"))
    for name, text in texts.items(): Path(f"{name}.yaml").write_text(text)
    assert main(["train", *re.sub("BAD|BROKEN|ALIAS|MERGE|POINT", r"\g<0>.yaml", words).split(),
                 "--output_dir", "out"]) == 2
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("rsground:")]
    assert len(lines) == 1 and message in lines[0], lines
    assert not Path("out").exists() or not any(Path("out").iterdir()), "a refused run leaves nothing behind"


def test_a_training_has_one_worker(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(launch, "make_trainer", lambda *parts: (None, None))
    monkeypatch.setattr(launch, "carry_out", lambda *parts: 0)
    words = ["train", "sft", "--config", "tiny_sft.yaml", "--output_dir", str(tmp_path / "out")]
    assert main(words) == 0
    with locked(tmp_path / "out" / "settings"): assert main(words) == 2
    assert "in use by another process" in capsys.readouterr().err and main(words) == 0


def test_a_launcher_that_asks_for_sharding_on_a_cpu_is_refused(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    assert main(["train", "grpo", "--config", "tiny_grpo.yaml", "--model_name_or_path", "tiny",
                 "--output_dir", str(tmp_path / "out")]) == 2
    assert "accelerate shards on GPUs only" in capsys.readouterr().err


def test_whose_folder_it_is(tmp_path):
    data, training, model = parsed(CONFIGS / "tiny_sft.yaml")
    settings = kept_settings(data, training, model)
    again = kept_settings(*parsed(CONFIGS / "tiny_sft.yaml", "--logging_steps", "7", "--output_dir",
                                  "elsewhere", "--resume_from_checkpoint", "some/checkpoint", "--save_steps",
                                  "3"))
    assert settings == again, "what changes no weight may differ"
    for words in (["--learning_rate", "1e-3"], ["--seed", "1"], ["--lora_r", "8"], ["--max_pixels", "3136"]):
        assert kept_settings(*parsed(CONFIGS / "tiny_sft.yaml", *words)) != settings
    assert not is_finished(tmp_path / "new", settings, None)
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(ValueError, match="not an empty folder"): is_finished(tmp_path, settings, None)


@pytest.fixture(scope="module")
def two_steps(tmp_path_factory):
    """(folder, words, lines): SFT and GRPO of two steps on 24 rows, done in this process; the words of the
    first, and the lines that do the same in two."""
    folder, lines = tmp_path_factory.mktemp("launch"), []
    (folder / "images").mkdir()
    rows = list(scene_records(24, 0, 112, "train"))
    for k, row in enumerate(rows):
        (folder / "images" / f"{k}.png").write_bytes(row["image"]["bytes"])
        row["image"] = str(folder / "images" / f"{k}.png")
    data = ["--data", f"{folder}/rows.jsonl@{write_jsonl(rows, folder / 'rows.jsonl', folder / 'images')}"]
    with pytest.MonkeyPatch.context() as patch:
        launch_worker.known_rollouts(patch.setattr)
        for stage, rows, more in (("sft", 8, []),
                                  ("grpo", 16, ["--model_name_or_path", str(folder / "sft-1" / "model"),
                                                "--max_completion_length", "12", "--temperature", "1.5"])):
            words = [stage, "--config", f"tiny_{stage}.yaml", *SHORT, *data, *more]
            assert main(["train", *words, "--output_dir", str(folder / f"{stage}-1"),
                         "--per_device_train_batch_size", str(rows)]) == 0
            lines.append(" ".join([*words, "--per_device_train_batch_size", str(rows // 2)]))
    return folder, ["train", "sft", "--config", "tiny_sft.yaml", *SHORT, *data,
                    "--per_device_train_batch_size", "8"], lines


@pytest.fixture(scope="module")
def two_processes(two_steps):
    """(folder, what the processes wrote): the same trainings in two processes, with DDP and with FSDP2."""
    folder, _, (sft, grpo) = two_steps
    lines = [f"ddp {sft} --output_dir {folder}/sft-ddp", f"ddp {grpo} --output_dir {folder}/grpo-ddp",
             f"fsdp {sft} --output_dir {folder}/sft-fsdp",
             f"fsdp {grpo} --output_dir {folder}/grpo-fsdp --share_prompt false",
             f"fsdp {grpo} --output_dir {folder}/never"]
    (folder / "lines.txt").write_text("\n".join(lines))
    words = ["--config_file", str(CONFIGS / "accelerate" / "fsdp_8gpus.yaml"), "--num_processes", "2",
             "--mixed_precision", "no", launch_worker.__file__, str(folder / "lines.txt")]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH":
                   os.pathsep.join([str(CONFIGS.parent.parent), os.environ.get("PYTHONPATH", "")])}
    done = subprocess.run([sys.executable, "-m", "accelerate.commands.launch", *words], cwd=folder,
                          env=environment, capture_output=True, text=True)
    assert "exit codes [0, 0, 0, 0, 2]" in done.stdout, done.stderr[-3000:]
    return folder, done.stderr


def test_training_moves_the_model_and_leaves_it_ready_to_use(two_steps):
    folder, _, _ = two_steps
    before, sft, grpo = (load_vlm("tiny")[0].state_dict(), weights(folder / "sft-1"),
                         weights(folder / "grpo-1"))
    for one, other in ((before, sft), (sft, grpo)):
        moved = {name for name in other if (one[name] - other[name]).abs().max() > 1e-5}
        assert moved and all("language_model.layers" in name for name in moved), (
            "LoRA sits on the layers of the language part, and only it may move")
    for stage in STAGES:
        assert (len(pd.read_csv(folder / f"{stage}-1" / "log.csv")) == 2
                and (folder / f"{stage}-1" / "adapter" / "adapter_model.safetensors").is_file())
    assert pd.read_csv(folder / "grpo-1" / "log.csv").reward_std.min() > 0


def test_the_same_command_again_does_nothing_and_another_is_refused(two_steps, capsys):
    folder, words, _ = two_steps
    words = [*words, "--output_dir", str(folder / "sft-1")]
    assert main(words) == 0 and "nothing to do" in capsys.readouterr().out
    assert main([*words, "--seed", "1"]) == 2 and "seed=0; this one has seed=1" in capsys.readouterr().err


# rollouts under FSDP are TRL's own, with other random numbers
@pytest.mark.parametrize("stage, kind", [("sft", "ddp"), ("grpo", "ddp"), ("sft", "fsdp")])
def test_two_processes_give_the_weights_of_one(two_processes, stage, kind):
    folder, _ = two_processes
    assert apart(folder / f"{stage}-1", folder / f"{stage}-{kind}") < 1e-5
    one, two = (pd.read_csv(folder / f"{stage}-{k}" / "log.csv") for k in (1, kind))
    assert abs(one.loss - two.loss).max() < 1e-4


def test_grpo_runs_under_fsdp_without_shared_prompts_only(two_processes):
    folder, said = two_processes
    assert (apart(folder / "sft-1", folder / "grpo-fsdp") > 1e-5
            and pd.read_csv(folder / "grpo-fsdp" / "log.csv").reward_std.iloc[0] > 0)
    assert "share_prompt=False" in said and not (folder / "never" / "settings").exists()


def test_an_interrupted_training_goes_on_only_when_asked(two_steps, capsys):
    folder, words, _ = two_steps
    words = [*words, "--output_dir", str(folder / "sft-4"), "--save_strategy", "steps", "--save_steps", "1"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(launch, "save_trained", lambda *given: 1 / 0)
        with pytest.raises(ZeroDivisionError): main(words)
    assert [p.name for p in (folder / "sft-4").glob("checkpoint-*")] == ["checkpoint-1"]
    assert main(words) == 2 and "--resume_from_checkpoint true" in capsys.readouterr().err
    assert main([*words, "--resume_from_checkpoint", "true"]) == 0
    assert (apart(folder / "sft-1", folder / "sft-4") < 1e-6
            and len(pd.read_csv(folder / "sft-4" / "log.csv")) == 2)


def test_a_reward_that_is_not_a_number_is_refused_here_too(tmp_path, monkeypatch):
    def iou_reward(completions, **columns): return [float("nan")] * len(completions)
    monkeypatch.setattr(launch, "make_rewards", lambda *args: [iou_reward])
    trainer, _ = launch.make_trainer(*parse_settings("grpo", ["--config", "tiny_grpo.yaml", "--output_dir",
                                                              str(tmp_path), "--reward_weights", "1.0",
                                                              "--model_name_or_path", "tiny"]))
    with pytest.raises(ValueError, match="iou_reward gave nan"): trainer.reward_funcs[0](completions=["a"])
