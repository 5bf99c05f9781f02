"""The trainer of chapter 9: the weight of each group on one and on two processes, under every
loss and schedule, and its guards. Rollouts are told, not drawn: those of question q lie off the
truth by multiples of q + 1."""
import math
import os
import tempfile
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings, strategies as st
from transformers import PrinterCallback

from rsground_nb.boxes import iou
from rsground_nb.data import to_dataset
from rsground_nb.grpo import SpatialGRPOTrainer
from rsground_nb.guards import SpatialGRPOConfig
from rsground_nb.model import adapt, codec_of, load_tiny, to_prompt
from rsground_nb.rewards import make_rewards
from rsground_nb.rollouts import by_group
from rsground_nb.safeguard import on_processes
from rsground_nb.scale import start
from rsground_nb.scenes import scene_records
from rsground_nb.weightings import lead_weight, seed_weight

G = 4
ROWS = [dict(row, box=[30.0, 30, 60, 60]) for row in scene_records(6, 0)]
SIDE = ROWS[0]["width"]


def rollout(question, k):
    """(text, box in pixels): off by k * (question + 1) pixels to the right; lengths differ."""
    box = [30 + k * (question + 1), 30, 60 + k * (question + 1), 60]
    return (f"<think>{'It is there. ' * k}</think>"
            f"<answer>[{', '.join(str(round(v * 1000 / SIDE)) for v in box)}]</answer>", box)


class Told(SpatialGRPOTrainer):
    def _generate_and_score_completions(self, inputs):
        self.asked, self.first = ([row["image_id"] for row in inputs],
                                  self.accelerator.process_index * len(inputs))
        return super()._generate_and_score_completions(inputs)

    def _generate_single_turn(self, prompt_ids, images, fields, num_generations, **kwargs):
        return [self.tell(int(name[-1]), (self.first + k) % G) for k, name in enumerate(self.asked)], None

    def tell(self, question, k):
        return [*self.processing_class.tokenizer(rollout(question, k)[0]).input_ids, self.eos_token_ids[0]]


def told(kind=Told, prepare=lambda model, processor: None, rewards=None, rank=0, rows=ROWS, questions=3,
         **changed):
    start(0)
    model, processor = load_tiny()
    lora = adapt(model, rank)
    prepare(model, processor)
    usual = dict(output_dir=tempfile.mkdtemp(), max_steps=2, per_device_train_batch_size=questions * G,
                 num_generations=G, max_completion_length=160, learning_rate=0.02, optim="sgd",
                 lr_scheduler_type="constant", loss_type="grpo", logging_steps=1, save_strategy="no",
                 report_to="none", use_cpu=True, bf16=False, disable_tqdm=True, seed=0, ddp_timeout=60)
    kept = to_dataset(list(rows)).select_columns(["image", "box", "width", "height", "image_id"]).add_column(
        "prompt", [to_prompt(row["expression"]) for row in rows])
    iou_reward = make_rewards(codec_of(model.config.model_type, processor))[1]
    trainer = kind(model=model, reward_funcs=rewards or [iou_reward],
                   args=SpatialGRPOConfig(**{**usual, **changed}), train_dataset=kept,
                   processing_class=processor, peft_config=lora)
    trainer.remove_callback(PrinterCallback)
    return trainer


def by_formula(question):
    """(advantages times weight, weight) of the question's rollouts, in plain Python."""
    written = [[round(v * 1000 / SIDE) * SIDE / 1000 for v in rollout(question, k)[1]] for k in range(G)]
    u = [iou(box, ROWS[question]["box"]) for box in written]
    mean = sum(u) / G
    squares = sum((v - mean) ** 2 for v in u)
    weight = min(3.0, max(0.5, math.exp(1.2 * (1 - mean) + squares / G)))
    return [weight * (v - mean) / (math.sqrt(squares / (G - 1)) + 1e-4) for v in u], weight


# each rollout meets its own weight, whatever the schedule

class Watched(Told):
    def _compute_loss(self, model, inputs):
        texts = self.processing_class.batch_decode(inputs["completion_ids"].reshape(
            -1, inputs["completion_ids"].shape[-1]), skip_special_tokens=True)
        self.__dict__.setdefault("met", []).append(list(zip(texts, inputs["advantages"].flatten().tolist(),
                                                            inputs["weight"].flatten().tolist())))
        return super()._compute_loss(model, inputs)


# the last one splits groups over passes
@pytest.mark.parametrize("schedule, passes", [
    (dict(num_iterations=2, max_steps=2), 2),
    (dict(per_device_train_batch_size=4, steps_per_generation=3, max_steps=3), 3),
    (dict(per_device_train_batch_size=4, gradient_accumulation_steps=3, share_prompt=False), 6),
    (dict(per_device_train_batch_size=4, gradient_accumulation_steps=3, steps_per_generation=6,
          num_iterations=2, max_steps=3), 9),
    (dict(per_device_train_batch_size=2, gradient_accumulation_steps=6, share_prompt=False, num_iterations=2),
     12)], ids=str)
def test_each_rollout_meets_the_weight_of_its_own_group(schedule, passes):
    # the perfect box is the same for all questions
    expected = {rollout(q, k)[0]: (a, by_formula(q)[1]) for q in range(6)
                for k, a in enumerate(by_formula(q)[0]) if k}
    assert len({round(w, 3) for _, w in expected.values()}) == 6  # so that a swap of two questions shows
    trainer = told(Watched, **schedule)
    trainer.train()
    assert len(trainer.met) == passes
    seen = [(text, a, w) for met in trainer.met for text, a, w in met if text in expected]
    assert len(seen) == 3 * passes * trainer.args.per_device_train_batch_size // 4
    for text, advantage, weight in seen: assert (advantage, weight) == pytest.approx(expected[text], abs=1e-5)


def test_lead_weights_praise_and_blame_apart():
    "All rollouts of question 1 have an IoU of at least 0.5, of question 3 three of four."
    trainer = told(Watched, rows=[ROWS[1], ROWS[3]], questions=2, weighting="lead", max_steps=1)
    trainer.train()
    share = {rollout(q, k)[0]: (sum(iou(rollout(q, j)[1], ROWS[q]["box"]) >= 0.5 for j in range(G)) / G)
             for q in (1, 3) for k in range(1, G)}
    curve = lambda x: 0.4 + 1.1 / (1 + math.exp(10 * (x - 0.75)))
    met = [(share[text], a, w) for text, a, w in trainer.met[0] if text in share]
    assert {(s, a < 0) for s, a, _ in met} == {(1, True), (1, False), (0.75, True), (0.75, False)}
    for s, a, w in met: assert w == pytest.approx(curve(1 - s if a < 0 else s), rel=1e-4)


# the loss with its KL term

LENGTHS = torch.tensor([8, 6, 3, 2, 1, 4, 7, 5])
LOSSES = ["grpo", "bnpo", "dr_grpo", "dapo", "luspo", "cispo", "sapo", "vespo"]
ROLLOUT_WEIGHTS = torch.tensor([2.9, 0.6]).repeat_interleave(G)


@pytest.fixture(scope="module")
def scopes():
    return {share: told(weight_scope="loss", beta=0.2, share_prompt=share) for share in (False, True)}


def loss_of(trainer, batch, logps, weight):
    """(value, gradient by logps) of the trainer's loss; advantages are scaled as
    `_generate_and_score_completions` does."""
    logps = logps.clone().requires_grad_()
    trainer._get_per_token_logps_and_entropies = lambda *args, **kwargs: (logps, torch.zeros_like(logps),
                                                                          None)
    trainer.current_gradient_accumulation_steps, batch = 1, {**batch, "advantages": batch["advantages"]
                                                             * weight, "weight": weight}
    loss = trainer._compute_loss(trainer.model.train(),
                                 by_group(batch, G) if trainer.args.share_prompt else batch)
    return loss.detach(), torch.autograd.grad(loss, logps)[0]


@pytest.mark.parametrize("share", [False, True])
@pytest.mark.parametrize("corrected", [True, False])
@pytest.mark.parametrize("loss_type", LOSSES)
def test_the_scope_loss_weights_policy_and_kl_alike(scopes, loss_type, corrected, share):
    draw, trainer = torch.Generator().manual_seed(0), scopes[share]
    trainer.loss_type, trainer.args.use_bias_correction_kl = loss_type, corrected
    logps = -2 * torch.rand(8, 8, generator=draw)
    old, reference = (logps + 0.4 * torch.randn(8, 8, generator=draw) for _ in range(2))
    one, mask = torch.ones(8, 1).long(), (torch.arange(8) < LENGTHS[:, None]).long()
    batch = dict(prompt_ids=one, prompt_mask=one, completion_ids=mask,
                 completion_mask=mask, old_per_token_logps=old, ref_per_token_logps=reference,
                 advantages=torch.tensor([1.3, -0.9, -0.4, 0.8, 0.2, -1.1, 0.5, -0.3]),
                 num_items_in_batch=LENGTHS.sum())
    value, gradient = loss_of(trainer, batch, logps, ROLLOUT_WEIGHTS)
    plain_value, plain = loss_of(trainer, batch, logps, torch.ones(8))
    torch.testing.assert_close(gradient, plain * ROLLOUT_WEIGHTS[:, None], rtol=1e-4, atol=1e-7)
    def alone(group):  # TRL's loss with the other group silent: no advantage, no distance from the reference
        mine = (torch.arange(8) // G == group)
        return loss_of(trainer, {**batch, "advantages": batch["advantages"] * mine,
                                 "ref_per_token_logps": torch.where(mine[:, None], reference, logps)}, logps,
                       torch.ones(8))[0]
    assert (value.item() == pytest.approx((2.9 * alone(0) + 0.6 * alone(1)).item(), rel=1e-4)
            and abs(value - plain_value) > 1e-4)


def test_a_real_step_with_kl():
    trainer = told(weight_scope="loss", beta=0.5)
    trainer.train()
    assert trainer.beta == 0.5 and trainer.state.log_history[1]["kl"] > 0


# the other weights, and what is logged

@pytest.fixture(scope="module")
def trainer(): return told()


def weighed(trainer, weighting, texts, ious):
    trainer.args.weighting = weighting
    trainer.model.train()
    trainer._metrics["train"].clear()
    trainer._weigh(torch.tensor(ious), [[dict(role="assistant", content=t)] for t in texts])
    trainer.args.weighting = "paper"
    return trainer._rollout_weights, {name: value for name, (value,) in trainer._metrics["train"].items()}


def test_every_weight_of_chapter_08_can_be_chosen(trainer):
    texts = [rollout(q, k)[0] for q in (0, 5) for k in range(G - 1)] + ["<think>no</think>",
                                                                        "<answer>[9, 9, 9, 9]</answer>"]
    order = [0, 1, 2, 6, 3, 4, 5, 7]
    # in pixels; the trainer reads thousandths
    boxes = torch.tensor([rollout(0, k)[1] for k in range(3)] + [[math.nan] * 4]
                         + [rollout(5, k)[1] for k in range(3)] + [[math.nan] * 4])
    ious = [1.0, 0.9, 0.8, 0.0, 1.0, 0.4, 0.2, 0.0]
    for weighting, expected in dict(lead=lead_weight(torch.tensor(ious), boxes, G),
                                    seed=seed_weight(torch.tensor(ious), boxes, G)[:, None]).items():
        weight, said = weighed(trainer, weighting, [texts[k] for k in order], ious)
        torch.testing.assert_close(weight, expected.float().repeat_interleave(G, 0))
        assert [said[f"consistency/weight_{end}"] for end in ("min", "max")] == pytest.approx(
            [expected.min().item(), expected.max().item()]) and "consistency/weight_at_limit" not in said
        assert said["consistency/unparsable"] == 0.25


def test_the_log_says_how_many_weights_are_cut(trainer):
    weight, said = weighed(trainer, "paper", ["<answer>[1, 1, 5, 5]</answer>"] * 12,
                           [0.0] * 4 + [1.0] * 4 + [0.5] * 4)
    assert weight[::G, 0].tolist() == pytest.approx([3, 1, math.exp(0.6)])
    assert said == pytest.approx({f"consistency/{name}": value for name, value in dict(
        weight_mean=(4 + math.exp(0.6)) / 3, weight_min=1, weight_max=3, iou_std_within=0, unparsable=0,
        weight_at_limit=1 / 3).items()})


@pytest.mark.parametrize("consistency", [True, False])
@pytest.mark.parametrize("near, signal", [(0.0, 2 / 3), (0.1, 1)])
def test_the_log_says_which_share_of_the_questions_all_rollouts_miss_and_which_has_signal(consistency, near,
                                                                                          signal):
    def iou_reward(completions, image_id, **columns):
        return [0.0 if name == ROWS[0]["image_id"] else float(k % 2) for k, name in enumerate(image_id)]

    def near_reward(completions, **columns): return [float(k % 4) for k in range(len(completions))]

    trainer = told(rewards=[iou_reward, near_reward], rows=ROWS[:3], consistency=consistency, max_steps=1,
                   reward_weights=[1.0, near])
    trainer.train()
    log = trainer.state.log_history[0]
    assert log["groups/all_miss"] == pytest.approx(1 / 3) and log["groups/signal"] == pytest.approx(signal)


def test_an_iou_that_is_none_is_refused(trainer):
    with pytest.raises(ValueError, match="in group 1 of 2"):
        weighed(trainer, "paper", [""] * 8, [0.5] * 7 + [1.5])


@pytest.mark.parametrize("wrong, says", [(dict(weighting="mine"), "use paper or lead or seed"),
                                         (dict(weight_scope="kl"), "use advantages or loss"),
                                         (dict(patience_without_signal=-1), "counts steps"),
                                         (dict(highest_truncated=1.5), "is a share"),
                                         (dict(beta=0.1), "weight_scope='loss'")])
def test_settings_that_are_refused(wrong, says):
    with pytest.raises(ValueError, match=says):
        SpatialGRPOConfig(output_dir="x", use_cpu=True, bf16=False, **wrong)


# guards

@settings(deadline=None)
@given(st.lists(st.booleans(), max_size=12), st.integers(0, 4))
def test_it_stops_after_so_many_silent_steps_in_a_row(trainer, silent, patience):
    trainer._silent_since, trainer.args.patience_without_signal = None, patience
    runs = ([all(silent[k - patience + 1:k + 1]) and k + 1 >= patience for k in range(len(silent))]
            if patience else [False])
    stop = runs.index(True) if any(runs) else None
    for step, quiet in enumerate(silent):
        trainer.state.global_step = step
        # questions differ, rollouts do not
        rewards = torch.tensor([0.3] * 4 + [2.1] * (3 if not quiet else 4) + [2.0] * (not quiet))[:, None]
        if step == stop:
            with pytest.raises(RuntimeError, match=f"step {step + 1}: for {patience} steps no two rollouts"):
                trainer._stop_without_signal(rewards)
            break
        trainer._stop_without_signal(rewards)
    trainer.state.global_step = 0


def test_a_reward_that_weighs_nothing_is_no_signal():
    both = [lambda completions, **columns: [0.5] * len(completions),
            lambda completions, **columns: [float(k) for k in range(len(completions))]]
    both[0].__name__ = "iou_reward"
    for weights, speaks in (([1.0, 0.0], False), ([1.0, 0.1], True)):
        trainer = told(rewards=both, reward_weights=weights, patience_without_signal=1, max_steps=1)
        if speaks: trainer.train()
        else:
            with pytest.raises(RuntimeError, match="no two rollouts"): trainer.train()


class Rambling(Told):
    # three of four do not end
    def tell(self, question, k): return super().tell(question, k)[:-1] if k else super().tell(question, k)


def test_it_stops_when_too_many_are_cut_off():
    with pytest.raises(RuntimeError,
                       match="step 1: 75% of the completions were cut at max_completion_length=160"):
        told(Rambling, highest_truncated=0.7).train()
    told(Rambling, highest_truncated=0.75, max_steps=1).train()
    told(Rambling, max_steps=1).train()


def spare(model, processor): model.lm_head.register_parameter("spare", torch.nn.Parameter(torch.ones(1)))


def frozen_spare(model, processor):
    spare(model, processor)
    model.lm_head.spare.requires_grad_(False)


def test_a_parameter_without_gradient_is_named():
    with pytest.raises(RuntimeError,
                       match=r"step 1: no gradient reached 1 of \d+ trainable parameters \(lm_head.spare\)"):
        told(prepare=spare, gradient_accumulation_steps=3, per_device_train_batch_size=4).train()
    told(prepare=spare, check_gradients=False, max_steps=1).train()
    told(prepare=frozen_spare, max_steps=1).train()
    told(rank=4, max_steps=1).train()  # LoRA's A gets zeros in its first step


def test_a_prompt_that_does_not_fit_the_model_is_refused_before_training():
    def merging(model, processor): processor.image_processor.merge_size = 2
    def blind(model, processor): model.config.image_token_id += 1
    for wrong, says in ((merging, r"has \d+ image tokens \(id \d+\), but its picture has \d+ features"),
                        (blind, "has 0 image tokens")):
        with pytest.raises(ValueError, match=says): told(prepare=wrong)


def test_rewards_without_iou_are_refused_before_training():
    def other_reward(completions, **columns): return [0.0] * len(completions)
    with pytest.raises(ValueError, match="named iou_reward; the given ones are other_reward"):
        told(rewards=[other_reward])
    assert told(rewards=[other_reward], consistency=False).reward_func_names == ["other_reward"]


# two processes

class OneSideRambles(Told):
    def tell(self, question, k):
        return super().tell(question, k)[:None if self.accelerator.process_index == 0 else -1]


class OneSideIsSilent(Told):
    def tell(self, question, k):
        return super().tell(question, 0 if self.accelerator.process_index == 0 else k)


class AllSilent(Told):
    def tell(self, question, k): return super().tell(question, 0)


class Kept(Watched):
    def _generate_and_score_completions(self, inputs):
        batch = super()._generate_and_score_completions(inputs)
        self.first_batch = self.__dict__.get("first_batch", (self.asked, batch["advantages"].flatten(),
                                                             batch["weight"].flatten()))
        return batch


def outcome(**how):
    try: return told(**how).train().global_step
    except RuntimeError as problem: return str(problem)


def work(folder):
    """Three questions; on two processes each holds one and a half of them."""
    count, rank = int(os.environ.get("WORLD_SIZE", 1)), os.environ.get("RANK", 0)
    trainer = told(Kept, share_prompt=False, per_device_train_batch_size=3 * G // count)
    trainer.train()
    kept = dict(asked=trainer.first_batch[0],
                advantages=trainer.first_batch[1], weight=trainer.first_batch[2],
                log=[{n: v for n, v in line.items() if n.startswith(("consistency/", "reward", "grad_norm"))}
                     for line in trainer.state.log_history],
                model={n: p.detach().clone() for n, p in trainer.model.named_parameters()})
    if count > 1:
        whole = dict(per_device_train_batch_size=G, max_steps=1)
        kept["guards"] = [outcome(kind=OneSideRambles, highest_truncated=0.4, **whole),
                          outcome(kind=OneSideIsSilent, patience_without_signal=1, highest_truncated=0.0,
                                  **whole), outcome(kind=AllSilent, patience_without_signal=1, **whole),
                          outcome(prepare=spare, **whole)]
    torch.save(kept, Path(folder) / f"{count}.{rank}.pt")


def test_one_and_two_processes_give_the_formula_and_the_same_step(tmp_path):
    for count in (1, 2): on_processes(count, work, tmp_path)
    alone, first, second = (torch.load(tmp_path / f"{name}.pt", weights_only=True)
                            for name in ("1.0", "2.0", "2.1"))
    asked = first["asked"] + second["asked"]
    assert asked == alone["asked"] and first["asked"][-1] == second["asked"][0]  # a group in two parts
    for name, expected in zip(("advantages", "weight"),
                              zip(*map(by_formula, (int(a[-1]) for a in asked[::G])))):
        expected = (torch.tensor(expected).flatten() if name == "advantages"
                    else torch.tensor(expected).repeat_interleave(G))
        for found in (alone[name], torch.cat([first[name], second[name]])):
            torch.testing.assert_close(found, expected, atol=1e-6, rtol=1e-5)
    assert len(alone["log"]) == len(first["log"]) == 3
    for a, b in zip(alone["log"], first["log"]): assert a == pytest.approx(b, rel=1e-4, abs=1e-5)
    for name, weight in alone["model"].items():
        assert first["model"][name].equal(second["model"][name]), name
        torch.testing.assert_close(first["model"][name], weight, atol=1e-6, rtol=0, msg=name)
    # nobody waits for the other
    for one, other in zip(first["guards"], second["guards"]): assert one == other
    cut, half_silent, silent, spared = first["guards"]
    assert ("50% of the completions" in cut and half_silent == 1 and "no two rollouts" in silent
            and "lm_head.spare" in spared)
