"""The consistency weight and its rivals, agreement between rollouts, and where a weight may be
applied: on TRL's real loss."""
import math
import re
from dataclasses import replace

import pytest
import torch
from hypothesis import given, strategies as st
from trl import GRPOConfig

from rsground_nb.boxes import iou
from rsground_nb.consistency import agreement, consistency_weight, group_statistics, pairwise_iou
from rsground_nb.data import to_dataset
from rsground_nb.train import grpo_rows, grpo_trainer
from rsground_nb.model import codec_of, load_tiny
from rsground_nb.scale import SMOKE, start
from rsground_nb.scenes import scene_records
from rsground_nb.weightings import (answer_entropy, check_groups, clusters, dispersion, group_table, has_box,
                                    lead_weight, medoid, paper_weight, seed_weight, weight_explorer)

share = st.floats(0, 1, width=32)
groups_of_8 = st.lists(share, min_size=8, max_size=8)
WEIGHTS = [paper_weight, lambda *a: lead_weight(*a)[:, 0], lambda *a: lead_weight(*a)[:, 1], seed_weight]
NO_BOX = [math.nan] * 4


# the weight

@given(groups_of_8)
def test_the_weight_is_the_formula(ious):
    mean = sum(ious) / 8
    variance = sum((v - mean) ** 2 for v in ious) / 8
    weight = consistency_weight(*group_statistics(torch.tensor(ious), 8)).item()
    assert weight == pytest.approx(min(3.0, math.exp(1.2 * (1 - mean) + variance)), rel=1e-4)
    assert weight >= 1 - 1e-6  # so that the lower limit 0.5 never binds


@given(groups_of_8)
def test_the_mean_term_dominates(ious):
    mean, variance = group_statistics(torch.tensor(ious), 8)
    assert 0 <= variance <= mean * (1 - mean) + 1e-6 <= 0.25 + 1e-5
    alone = consistency_weight(mean, variance, lambda_mean=0.0)
    assert 1 - 1e-6 <= alone <= math.exp(0.25) + 1e-5


def test_the_four_terms_of_the_ablation():
    ious = torch.tensor([1.0, 0, 1, 0])
    weigh = lambda *terms: consistency_weight(*group_statistics(ious, 4), *terms).item()
    assert [weigh(0, 0), weigh(1.2, 0), weigh(0, 1), weigh(1.2, 1)] == pytest.approx(
        [1, math.exp(0.6), math.exp(0.25), math.exp(0.85)], rel=1e-6)


def test_the_cut_hides_how_hard_a_hard_question_is():
    one_right, none_right = (consistency_weight(*group_statistics(torch.tensor([r] + [0.0] * 7), 8)).item()
                             for r in (1.0, 0.0))
    assert one_right == none_right == 3
    assert (consistency_weight(torch.tensor(0.24), torch.tensor(0.24 * 0.76)) < 3
            and consistency_weight(torch.tensor(0.23), torch.tensor(0.23 * 0.77)) == 3)


def test_a_group_of_one_has_no_variance_and_part_groups_are_refused():
    assert group_statistics(torch.tensor([0.3]), 1)[1] == 0
    for bad in (0, 4):
        with pytest.raises(ValueError, match="do not make whole groups"):
            group_statistics(torch.zeros(5), bad)
        with pytest.raises(ValueError, match="do not make whole groups"): check_groups(torch.zeros(5), bad)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -0.1, 1.1])
@pytest.mark.parametrize("weight", WEIGHTS)
def test_an_iou_that_is_none_is_refused_with_the_number_of_its_group(weight, bad):
    ious = torch.tensor([0.1, 0.2, 0.3, 0.4, bad, 0.5])
    with pytest.raises(ValueError, match="in group 2 of 3"): weight(ious, torch.zeros(6, 4), 2)
    with pytest.raises(ValueError, match=r"shape \(6, 4\)"): weight(ious, torch.zeros(5, 4), 2)


@pytest.mark.parametrize("weight", WEIGHTS)
@pytest.mark.parametrize("size", [1, 2, 8])
def test_every_weight_is_finite_where_nothing_can_be_read(weight, size):
    found = weight(torch.zeros(3 * size), torch.full((3 * size, 4), math.nan), size)
    assert found.shape == (3,) and found.isfinite().all() and (found > 0).all()


# agreement

@st.composite
def crowds(draw, least=2):
    number = st.integers(0, 60)
    box = st.tuples(number, number, st.integers(1, 50), st.integers(1, 50)).map(
        lambda b: [b[0], b[1], b[0] + b[2], b[1] + b[3]])
    return draw(st.lists(st.one_of(box, st.just(NO_BOX)), min_size=least, max_size=9))


def plain(box): return (0, 0, 0, 0) if box[0] != box[0] else box


@given(crowds())
def test_the_fast_measures_equal_the_loops(boxes):
    count, real = len(boxes), [b for b in boxes if b[0] == b[0]]
    table = [[iou(plain(a), plain(b)) for b in boxes] for a in boxes]
    group = torch.tensor([boxes], dtype=torch.double)
    assert torch.allclose(pairwise_iou(group)[0], torch.tensor(table, dtype=torch.double), atol=1e-12)
    assert agreement(group).item() == pytest.approx(sum(table[i][j] for i in range(count) for j in range(i))
                                                    / (count * (count - 1) / 2))
    support = [sum(table[i][j] for j in range(count) if j != i) if boxes[i] in real else -1
               for i in range(count)]
    assert support[medoid(group).item()] == pytest.approx(max(support))
    if len(real) < 2: assert dispersion(group).isnan().all()
    else:
        centres = [((a + c) / 2, (b + d) / 2) for a, b, c, d in real]
        middle = [sum(c[k] for c in centres) / len(real) for k in (0, 1)]
        side = sum(math.sqrt((c - a) * (d - b)) for a, b, c, d in real) / len(real)
        assert dispersion(group).item() == pytest.approx(
            math.sqrt(sum(math.dist(c, middle) ** 2 for c in centres) / len(real)) / side, abs=1e-9)


@given(crowds(), st.floats(0.01, 1000), st.floats(-500, 500))
def test_units_and_place_do_not_matter(boxes, factor, shift):
    group = torch.tensor([boxes], dtype=torch.double)
    for measure in (agreement, dispersion, answer_entropy):
        # on the edge of a cluster
        if measure is answer_entropy and (pairwise_iou(group) - 0.5).abs().min() < 1e-6: continue
        assert torch.allclose(measure(group), measure(factor * group + shift), atol=1e-6, equal_nan=True)


@given(crowds(), st.randoms())
def test_the_order_of_rollouts_does_not_matter(boxes, random):
    shuffled = random.sample(boxes, len(boxes))
    one, other = torch.tensor([boxes], dtype=torch.double), torch.tensor([shuffled], dtype=torch.double)
    for measure in (agreement, dispersion, answer_entropy):
        assert torch.allclose(measure(one), measure(other), atol=1e-9, equal_nan=True)


@given(crowds(least=1))
def test_clusters_are_what_a_flood_fill_finds(boxes):
    first = {}
    for k in range(len(boxes)):
        if k in first: continue
        todo = [k]
        while todo:
            here = todo.pop()
            first[here] = k
            todo += [j for j in range(len(boxes)) if j not in first
                     and iou(plain(boxes[here]), plain(boxes[j])) >= 0.5]
    group = torch.tensor([boxes], dtype=torch.double)
    assert clusters(group)[0].tolist() == [first[k] for k in range(len(boxes))]
    assert -1e-12 <= answer_entropy(group).item() <= 1 + 1e-12


@given(crowds(), st.integers(2, 5))
def test_the_medoid_is_the_first_of_equals(boxes, copies):
    group = torch.tensor([boxes * copies], dtype=torch.double)
    assert medoid(group).item() < len(boxes)


def test_degenerate_groups_of_boxes():
    alone = torch.tensor([[[0.0, 0, 5, 5]], [NO_BOX]])
    assert (agreement(alone).isnan().all() and dispersion(alone).isnan().all()
            and medoid(alone).tolist() == [0, 0] and answer_entropy(alone).tolist() == [0, 0])
    # no area, swapped, infinite, half missing, fine
    odd = torch.tensor([[[5.0, 5, 5, 9], [9, 5, 5, 9], [math.inf, 0, 5, 5], [1, math.nan, 5, 5],
                         [0, 0, 5, 5]]])
    assert (has_box(odd).tolist() == [[False, False, False, False, True]] and agreement(odd).item() == 0
            and medoid(odd).item() == 4)
    same = torch.tensor([[[0.0, 0, 5, 5]] * 8])
    assert (agreement(same).item(), dispersion(same).item(), answer_entropy(same).item()) == (1, 0, 0)


# weights from the literature

# always right, the same wrong object, eight places
SPOTS = [*[(0.0, 0, 10, 10)] * 8, *[(50.0, 50, 60, 60)] * 8,
         *[(20.0 * k + 20, 50, 20.0 * k + 30, 60) for k in range(8)]]


def test_the_weights_disagree_in_sign():
    given_all = torch.tensor([1.0] * 8 + [0.0] * 16), torch.tensor(SPOTS), 8
    right, wrong, lost = paper_weight(*given_all).tolist()
    assert right == 1 and wrong == lost == 3
    right, wrong, lost = seed_weight(*given_all).tolist()
    assert right == wrong == 1 and lost == pytest.approx(0.5)
    up, down = lead_weight(*given_all).unbind(1)
    assert up[0] < up[1] == up[2] and down[0] > down[1] == down[2] and up[0] == pytest.approx(down[1])


@given(st.integers(0, 8))
def test_grpo_lead_is_its_authors_curve(right):
    ious = torch.tensor([0.5] * right + [0.49] * (8 - right))
    curve = lambda x: 0.4 + 1.1 / (1 + math.exp(10 * (x - 0.75)))
    assert lead_weight(ious, torch.zeros(8, 4), 8).tolist() == [pytest.approx([curve(right / 8),
                                                                               curve(1 - right / 8)])]


@given(crowds(least=1), st.floats(0, 1))
def test_seed_never_makes_an_uncertain_question_louder(boxes, sensitivity):
    found = seed_weight(torch.zeros(len(boxes)), torch.tensor(boxes, dtype=torch.double), len(boxes),
                        sensitivity=sensitivity).item()
    assert found == pytest.approx(1 - sensitivity * answer_entropy(torch.tensor([boxes], dtype=torch.double))
                                  .item()) and found <= 1 + 1e-12


# the table and the widget

@given(st.lists(st.one_of(share, st.none()), min_size=2, max_size=8), st.integers(1, 200))
def test_the_table_is_trls_arithmetic(ious, length):
    table = group_table(ious, [length] * len(ious))
    rewards = torch.tensor([0.0 if u is None else 1.0 + u for u in ious], dtype=torch.double)
    advantages = (rewards - rewards.mean()) / (rewards.std() + 1e-4)
    weight = consistency_weight(*group_statistics(torch.tensor([u or 0.0 for u in ious]), len(ious))).item()
    assert table.per_token.to_numpy() == pytest.approx((weight * advantages / length).numpy(), abs=1e-5)


def test_the_table_of_degenerate_groups():
    assert ((group_table([0.7] * 4, [9] * 4).per_token.abs() < 1e-9).all()
            and (group_table([None] * 4, [9] * 4).per_token == 0).all()
            and group_table([0.7], [9]).per_token.iloc[0] == 0)
    for ious, lengths, message in (([0.5, math.nan], [9, 9], "group 0 of 1"),
                                   ([0.5], [0], "lengths of at least 1"),
                                   ([0.5], [1, 2], "lengths of at least 1"),
                                   ([], [], "lengths of at least 1")):
        with pytest.raises(ValueError, match=message): group_table(ious, lengths)


def test_the_widget_shows_the_table_of_its_sliders():
    explorer = weight_explorer()
    view = explorer.children[1]
    sliders = {s.description: s for column in explorer.children[0].children for s in column.children}
    shown = lambda: view.value
    assert shown() == group_table([0.8, 0.3, 0, 0], [40, 80, 40, 20]).to_html(float_format="{:.3f}".format)
    sliders["IoU 2"].value, sliders["tokens 1"].value, sliders["λ variance"].value, sliders[
        "highest"].value = 1.0, 10, 4.0, 2.0
    assert shown() == group_table([0.8, 1.0, 0, 0], [10, 80, 40, 20], 1.2, 4.0, 0.5,
                                  2.0).to_html(float_format="{:.3f}".format) and "2.000" in shown()
    sliders["highest"].value = 1.0
    assert "<td>1.000</td>" in shown()


# scaling the advantages is scaling the loss: TRL's own loss, each group alone against the weighted batch

SIZE = 3
LENGTHS = torch.tensor([8, 6, 3, 2, 1, 4])
LOSSES = ["grpo", "bnpo", "dr_grpo", "dapo", "luspo", "cispo", "sapo", "vespo"]
W = torch.tensor([2.9, 0.6])


@pytest.fixture(scope="module")
def real(tmp_path_factory):
    """The project's trainer on the tiny model, and a batch of two groups of three with ratios off 1,
    advantages of both signs, and a reference."""
    start(0)
    model, processor = load_tiny()
    rows = grpo_rows(to_dataset(list(scene_records(6, 0))))
    trainer = grpo_trainer(model, processor, rows, codec_of(model.config.model_type, processor),
                           replace(SMOKE, prompts_per_step=2, num_generations=SIZE, lora_rank=8), 0,
                           tmp_path_factory.mktemp("grpo"), disable_tqdm=True, share_prompt=False)
    trainer.current_gradient_accumulation_steps = 1
    draw = torch.Generator().manual_seed(0)
    tokens = torch.randint(400, (6, 12), generator=draw)
    with torch.no_grad():
        now = trainer._get_per_token_logps_and_entropies(trainer.model, tokens, torch.ones_like(tokens), 8)[0]
    old, reference = (now + 0.4 * torch.randn(6, 8, generator=draw) for _ in range(2))
    batch = dict(prompt_ids=tokens[:, :4], prompt_mask=torch.ones(6, 4).long(), completion_ids=tokens[:, 4:],
                 completion_mask=(torch.arange(8) < LENGTHS[:, None]).long(), old_per_token_logps=old,
                 ref_per_token_logps=reference, advantages=torch.tensor([1.3, -0.9, -0.4, 0.8, 0.0, -1.1]),
                 num_items_in_batch=LENGTHS.sum())
    moving = [p for n, p in trainer.model.named_parameters() if "lora_B" in n]

    def run(inputs):
        loss = trainer._compute_loss(trainer.model, inputs)
        return torch.cat([loss.detach()[None], *[g.flatten() for g in torch.autograd.grad(
            loss, moving, materialize_grads=True, allow_unused=True)]])
    return trainer, batch, run


def both_ways(real, loss_type, beta=0.0, level="token", weights=W):
    """(value and gradient with scaled advantages, the same from the weighted losses of the groups alone, the
    gap that the KL term leaves)"""
    trainer, batch, run = real
    trainer.loss_type, trainer.importance_sampling_level = loss_type, level
    tokens = LENGTHS.view(2, SIZE).sum(1) / LENGTHS.sum()
    shares = tokens if loss_type in ("bnpo", "dapo", "cispo", "vespo") else torch.tensor([0.5, 0.5])
    def alone(k):
        part = {n: v[k * SIZE:(k + 1) * SIZE] for n, v in batch.items() if n != "num_items_in_batch"}
        return run({**part, "num_items_in_batch": part["completion_mask"].sum()})
    trainer.beta = beta
    scaled, losses = (run({**batch, "advantages": batch["advantages"] * weights.repeat_interleave(SIZE)}),
                      [alone(k) for k in (0, 1)])
    trainer.beta = 0.0
    kl = [a - alone(k) for k, a in enumerate(losses)] if beta else [0, 0]
    return (scaled, sum(s * w * part for s, w, part in zip(shares, weights, losses)),
            sum(s * (w - 1) * part for s, w, part in zip(shares, weights, kl)))


def close(a, b, tolerance=1e-5):
    return ((a[0] - b[0]).abs() <= tolerance * (1 + b[0].abs())
            and (a[1:] - b[1:]).norm() <= tolerance * b[1:].norm())


def test_all_loss_types_of_trl_are_looked_at():
    said = GRPOConfig.__dataclass_fields__["loss_type"].metadata["help"]
    assert set(re.findall(r"'(\w+)'", said.split("Supported values are")[1].split(".")[0])) == set(LOSSES)


@pytest.mark.parametrize("loss_type", LOSSES)
def test_scaling_advantages_is_scaling_the_loss_without_kl(real, loss_type):
    by_advantage, by_loss, _ = both_ways(real, loss_type)
    assert by_loss[1:].norm() > 0 and close(by_advantage, by_loss)
    unweighted, _, _ = both_ways(real, loss_type, weights=torch.ones(2))
    assert not close(by_advantage, unweighted, 1e-2)


@pytest.mark.parametrize("loss_type", ["grpo", "luspo", "sapo"])
def test_so_it_is_with_ratios_of_whole_answers(real, loss_type):
    assert close(*both_ways(real, loss_type, level="sequence")[:2])


@pytest.mark.parametrize("loss_type", LOSSES)
def test_a_kl_term_is_left_unweighted_and_the_gap_is_known(real, loss_type):
    by_advantage, by_loss, gap = both_ways(real, loss_type, beta=0.2)
    assert not close(by_advantage, by_loss, 1e-3)
    assert close(by_advantage + gap, by_loss, 1e-4)


def test_a_negative_weight_is_another_matter(real):
    assert not close(*both_ways(real, "grpo", weights=torch.tensor([-1.0, 1.0]))[:2], 1e-2)
    # a straight line does not mind
    assert close(*both_ways(real, "cispo", weights=torch.tensor([-1.0, 1.0]))[:2])
    assert close(*both_ways(real, "grpo", weights=torch.tensor([0.0, 1.0]))[:2])    # nor does zero


def test_scaling_rewards_before_they_are_standardised_is_lost():
    rewards = torch.tensor([1.0, 1.3, 1.8, 1.0], dtype=torch.double)
    standardised = lambda r: (r - r.mean()) / (r.std() + 1e-4)
    assert torch.allclose(standardised(3 * rewards), standardised(rewards), atol=1e-3)
