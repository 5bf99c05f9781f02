"""The bandit: advantages as TRL scales them, policies that train in company exactly as alone, and what the
chapter says of the reach of rewards."""
import csv
from pathlib import Path

import pytest
import torch
from hypothesis import given, strategies as st

from rsground_nb.bandit import SPREAD, TARGET, interval, to_boxes, train_policies, weighted
from rsground_nb.rewards import group_advantages, ious

OVERLAP, POSITIONAL = weighted({"iou": 1}), weighted({"iou": 1, "center": 0.1})
groups = st.lists(st.lists(st.floats(-1, 2), min_size=4, max_size=4), min_size=1, max_size=3)


def at(*distances): return torch.tensor([[d, 0, 0, 0] for d in distances], dtype=torch.float64)


def final(means): return ious(to_boxes(means[:, :, -1]), TARGET)


@given(groups)
def test_advantages_have_mean_zero_and_their_scale(rewards):
    rewards = torch.tensor(rewards, dtype=torch.float64)
    for way, std in (("group", rewards.std(1, keepdim=True)), ("batch", rewards.std()), ("none", None)):
        found = group_advantages(rewards, way)
        assert torch.allclose(found.mean(-1), torch.zeros(len(rewards)).double(), atol=1e-6)
        expected = rewards - rewards.mean(1, keepdim=True)
        assert torch.allclose(found, expected if std is None else expected / (std + 1e-4))


def test_equal_rewards_and_groups_of_one_teach_nothing():
    for way in ("group", "batch", "none"):
        assert not group_advantages(torch.full((2, 3, 4), 0.7), way).abs().gt(1e-3).any()
        assert group_advantages(torch.tensor([[0.3], [0.9]]), way).tolist() == [[0], [0]]
    with pytest.raises(ValueError, match="unknown scaling"): group_advantages(torch.zeros(2, 4), "std")
    with pytest.raises(ValueError, match="unknown optimizer"):
        train_policies(OVERLAP, at(1), [0], optimizer="lion")


def test_the_step_is_the_gradient_of_grpo():
    """One step of the natural gradient against autograd through torch's own density, times the
    inverse Fisher information."""
    noise = torch.randn(1, 8, 4, generator=torch.Generator().manual_seed(3), dtype=torch.float64)[0]
    mean, log_spread = (at(0.7)[0].requires_grad_(),
                        torch.tensor(SPREAD, dtype=torch.float64).log().requires_grad_())
    z = (mean + log_spread.exp() * noise).detach()
    (-(group_advantages(POSITIONAL(to_boxes(z)))
       * torch.distributions.Normal(mean, log_spread.exp()).log_prob(z).sum(1)).mean()).backward()
    means, spreads = train_policies(POSITIONAL, at(0.7), [3], steps=1, learning_rate=0.1)
    assert torch.allclose(means[0, 0, 1], (mean - 0.1 * log_spread.exp() ** 2 * mean.grad).detach())
    assert torch.allclose(spreads[0, 0, 1].log(), (log_spread - 0.05 * log_spread.grad).detach())


@pytest.mark.parametrize("options", [{}, dict(optimizer="adam", learning_rate=0.05), dict(learn_spread=False),
                                     dict(scale_rewards="none")])
def test_a_seed_does_not_depend_on_its_company(options):
    means, spreads = train_policies(POSITIONAL, at(0.5, 3), [4, 9], steps=40, **options)
    alone, narrow = train_policies(POSITIONAL, at(3), [9], steps=40, **options)
    assert torch.allclose(means[1, 1], alone[0, 0], atol=1e-9) and torch.allclose(spreads[1, 1], narrow[0, 0],
                                                                                  atol=1e-9)
    assert means.shape == (2, 2, 41, 4) and torch.equal(means[:, :, 0], at(0.5, 3).expand(2, 2, 4))


def test_batch_scaling_looks_at_the_other_questions():
    means = [train_policies(POSITIONAL, at(5, other), [0], steps=20, scale_rewards="batch")[0][0, 0]
             for other in (0.5, 5)]
    assert (means[0][-1, 0] - 5).abs() < 0.1 * (means[1][-1, 0] - 5).abs()


def test_iou_is_silent_from_far_where_the_positional_reward_speaks():
    silent, heard = (train_policies(f, at(0.5, 5, 12), range(4))[0] for f in (OVERLAP, POSITIONAL))
    assert torch.equal(silent[:, 1, -1], silent[:, 1, 0]) and (final(silent)[:, 0] > 0.95).all()
    assert (final(heard)[:, :2] > 0.95).all() and (final(heard)[:, 2] == 0).all()


def test_area_alone_shrinks_the_box_and_beside_iou_it_does_not():
    side = lambda weights: train_policies(weighted(weights), at(0.5), range(4))[0][:, 0, -1, 2:].mean(1).exp()
    assert (side({"area": 1}) < 0.5).all() and ((side({"iou": 1, "area": 0.1}) - 1).abs() < 0.05).all()


def test_a_fixed_spread_makes_iou_ask_for_a_larger_box():
    assert ((train_policies(OVERLAP, at(0.5), range(4), learn_spread=False)[0][:, 0, -1, 2:].mean(1) > 0.1)
            .all())


def test_interval_holds_the_mean_and_narrows_with_seeds():
    few, many = (torch.randn(n, 3, generator=torch.Generator().manual_seed(0)) for n in (10, 1000))
    for values in (few, many):
        middle, low, high = interval(values)
        assert (low < middle).all() and (middle < high).all() and torch.allclose(middle, values.mean(0))
    assert ((interval(many)[2] - interval(many)[1]) < 0.3 * (interval(few)[2] - interval(few)[1])).all()


def test_the_table_of_the_sweeps_is_what_the_code_gives():
    """One line of benchmark_bandit.csv, computed anew."""
    rows = list(csv.DictReader((Path(__file__).parent / "benchmark_bandit.csv").open(encoding="utf-8")))
    row, = [r for r in rows if (r["experiment"], r["reward"], r["num_generations"], r["start"])
            == ("group size", "iou + 0.1 center", "2", "far")]
    found = final(train_policies(POSITIONAL, at(0.5, 2, 5, 10), range(20), num_generations=2)[0])[
        :, 2].mean().item()
    assert found == pytest.approx(float(row["iou"]), abs=0.1) and int(row["seeds"]) == 20


def test_adam_is_that_of_torch():
    means, spreads = train_policies(POSITIONAL, at(1), [5], steps=30, optimizer="adam", learning_rate=0.05)
    noise = torch.randn(30, 8, 4, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    mean, log_spread = (at(1)[0].requires_grad_(),
                        torch.tensor(SPREAD, dtype=torch.float64).log().requires_grad_())
    adam = torch.optim.Adam([mean, log_spread])
    for t, eps in enumerate(noise):
        z = (mean + log_spread.exp() * eps).detach()
        adam.param_groups[0]["lr"] = 0.05 * (1 - t / 30)
        adam.zero_grad()
        (-(group_advantages(POSITIONAL(to_boxes(z)))
           * torch.distributions.Normal(mean, log_spread.exp()).log_prob(z).sum(1)).mean()).backward()
        adam.step()
    assert (torch.allclose(means[0, 0, -1], mean.detach(), atol=1e-7)
            and torch.allclose(spreads[0, 0, -1].log(), log_spread.detach(), atol=1e-7))
