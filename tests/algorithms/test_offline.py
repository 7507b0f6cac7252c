"""Diffusion-DPO and Diffusion-KTO: losses and gradients, what is drawn, one noise for a pair, and k of an iteration."""

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from preference_sets import CAPTIONS, write_judged, write_pairs
from torch import Tensor

from adascope_fast import schedules
from adascope_fast.algorithms import diffusion_dpo, diffusion_kto
from adascope_fast.algorithms.algorithm import Context
from adascope_fast.algorithms.preference import divergence_of, judged_margin, pair_margin
from adascope_fast.algorithms.regression import mean_square
from adascope_fast.rollout import Stills

KNOWN = json.loads((Path(__file__).parents[1] / "data" / "vectors.json").read_text())
SHAPE = (2, 3, 3)


def _sigmoid(x: Tensor) -> Tensor:
    return 1 / (1 + (-x).exp())


def _dpo(error: Tensor, ref_error: Tensor, beta: float) -> Tensor:
    """Wallace et al., as their equation 14 and code have it: -log sigmoid(-beta / 2 * (model - reference))."""
    model, reference = error[0] - error[1], ref_error[0] - ref_error[1]
    return -_sigmoid(-0.5 * beta * (model - reference)).log()


def _kto(error: Tensor, ref_error: Tensor, sign: Tensor, beta: float, weight: Tensor) -> Tensor:
    """Li et al.: w (1 - sigmoid(y beta (g - max(0, mean g)))), g = e_ref - e, the mean without gradient."""
    g = ref_error - error
    return weight * (1 - _sigmoid(sign * beta * (g - g.mean().clamp(min=0).detach())))


def test_dpo_is_the_known_answer_and_its_gradient():
    known = KNOWN["diffusion_dpo"]
    error = torch.tensor([[known["err_w"]], [known["err_l"]]], dtype=torch.float64, requires_grad=True)
    reference = torch.tensor([[known["ref_w"]], [known["ref_l"]]], dtype=torch.float64)
    loss = torch.nn.functional.softplus(-pair_margin(error, reference, beta=known["beta"]))
    (grad,) = torch.autograd.grad(loss.sum(), error)
    assert loss.item() == pytest.approx(known["loss"], rel=1e-12)
    assert grad.flatten().tolist() == pytest.approx([known["d_err_w"], known["d_err_l"]], rel=1e-12)


def test_kto_is_the_known_answer_and_its_gradient():
    known = KNOWN["diffusion_kto"]
    error = torch.tensor(known["err"], dtype=torch.float64, requires_grad=True)
    reference = torch.tensor(known["ref_err"], dtype=torch.float64)
    sign = 2.0 * torch.tensor(known["label"]) - 1
    divergence = divergence_of(error, reference)
    margin = judged_margin(error, reference, divergence, sign, beta=known["beta"])
    loss = (1 - torch.sigmoid(margin)).mean()
    (grad,) = torch.autograd.grad(loss, error)
    assert divergence.item() == pytest.approx(known["kl_offset"], rel=1e-12)
    assert loss.item() == pytest.approx(known["loss"], rel=1e-12)
    assert grad.tolist() == pytest.approx(known["d_err"], rel=1e-12)
    assert divergence_of(reference + 1, reference).item() == 0, "never below zero"


class _Collector:
    """Latents that tell the picture, and the prompts' numbers in the order of a draw."""

    def __init__(self, told: list[str], schedule: Any) -> None:
        self.prompts, self._schedule = told, schedule

    def stills(self, pictures: Any, prompts: list[str], told: list[str]) -> Stills:
        names = [str(picture.path) for picture in pictures]
        seeds = [sum(map(ord, name[-8:])) for name in names]
        latents = torch.stack([torch.randn(SHAPE, generator=torch.Generator().manual_seed(seed)) for seed in seeds])
        distinct = list(dict.fromkeys(self.prompts))
        index = torch.tensor([distinct.index(one) for one in told])
        self.names = [Path(name).name for name in names]
        return Stills(latents, self._schedule, prompts, index)


def _policy(schedule: Any, dtype: torch.dtype = torch.float32) -> Any:
    """A reference that says a part of the sample, and a policy with a parameter that scales it."""
    parameter = torch.nn.Parameter(torch.tensor(0.7, dtype=dtype))

    def output(sample: Tensor, timestep: Tensor, prompt_index: Tensor) -> Tensor:
        return parameter * sample

    def reference(sample: Tensor, timestep: Tensor, prompt_index: Tensor, *, is_guided: bool) -> Tensor:
        assert not is_guided, "the originals train without guidance"
        return 0.6 * sample

    def frozen(*where: Tensor) -> Tensor:
        return output(*where).detach()

    return SimpleNamespace(
        output=output, reference=reference, frozen=frozen, schedule=schedule, parameter=parameter,
        parameters=lambda: [parameter],
    )  # fmt: skip


def _flow(t: int = 5) -> Any:
    return schedules.flow_ode(torch.linspace(1, 0, t + 1))


def _iteration(algorithm: Any, count: int, keep: Tensor | None = None, **context: Any) -> tuple[Any, Any, Stills, Any]:
    """(rows, policy, stills, collector) of one iteration of `count` records."""
    schedule = algorithm.schedule(_flow())
    assert schedule.trainable.all(), "a deterministic sampler has noise levels, too"
    collector = _Collector(algorithm.draw(11, count), schedule)
    stills = algorithm.collect(collector)
    keep = torch.ones(len(stills.prompts), 5, dtype=torch.bool) if keep is None else keep
    policy = _policy(schedule)
    rows = algorithm.batch(stills, Context(policy, keep, torch.Generator().manual_seed(0), **context))
    return rows, policy, stills, collector


def test_a_pair_has_one_noise_and_one_level_and_its_loss_is_the_formula(tmp_path: Path):
    algorithm = diffusion_dpo(preferences=str(write_pairs(tmp_path)), beta=3.0, num_draws=2)
    rows, policy, stills, collector = _iteration(algorithm, 3)
    assert (len(rows), rows.num_forwards) == (6, 2)
    assert [name[1:] for name in collector.names] == ["a.png"] * 3 + ["b.png"] * 3
    assert [name[0] for name in collector.names[:3]] == [name[0] for name in collector.names[3:]]
    batch = rows.take(torch.arange(6))
    better, worse = rows.better.sample_index, rows.better.sample_index + 3
    assert torch.equal(rows.worse.sample_index, worse)
    signal, sigma = (level.float()[batch.step].view(12, 1, 1, 1) for level in stills.schedule.levels())
    noise = (batch.sample - signal * stills.latents[torch.cat([better, worse])]) / sigma
    torch.testing.assert_close(noise[:6], noise[6:], rtol=1e-5, atol=1e-5)
    assert torch.equal(batch.step[:6], batch.step[6:])
    loss = algorithm.loss(policy, batch, is_on_policy=True, scale=1.0)
    (grad,) = torch.autograd.grad(loss.values.mean(), policy.parameter)

    parameter = torch.tensor(0.7, dtype=torch.float64, requires_grad=True)
    x, target = batch.sample.double(), batch.target.double()
    error, reference = (((scale * x - target) ** 2).mean((1, 2, 3)).view(2, 6) for scale in (parameter, 0.6))
    want = _dpo(error, reference, 3.0)
    (want_grad,) = torch.autograd.grad(want.mean(), parameter)
    torch.testing.assert_close(loss.values.double(), want, rtol=2e-5, atol=1e-7)
    torch.testing.assert_close(grad.double(), want_grad, rtol=2e-5, atol=1e-7)
    margin = -1.5 * ((error[0] - error[1]) - (reference[0] - reference[1]))
    torch.testing.assert_close(loss.statistics["margin"].double(), margin.detach(), rtol=2e-5, atol=1e-6)
    assert loss.statistics["accuracy"].tolist() == (margin > 0).float().tolist()
    assert 0 < loss.statistics["accuracy"].mean() < 1


def test_k_is_of_all_rows_of_the_iteration_and_the_loss_is_the_formula(tmp_path: Path):
    keys: dict[str, Any] = {"beta": 3.0, "liked_weight": 0.5, "disliked_weight": 2.0, "num_draws": 2}
    keys["positive_ratio"] = 0.5
    algorithm = diffusion_kto(preferences=str(write_judged(tmp_path)), **keys)
    found = []
    for microbatch in (1, 5, 64):
        rows, policy, _, collector = _iteration(algorithm, 7, microbatch=microbatch)
        batch, ref_error, divergence = rows.take(torch.arange(14))
        loss = algorithm.loss(policy, (batch, ref_error, divergence), is_on_policy=True, scale=1.0)
        (grad,) = torch.autograd.grad(loss.values.mean(), policy.parameter)
        found.append((loss.values.detach(), grad))
    is_liked = torch.tensor([int(name[0]) % 3 != 2 for name in collector.names])[rows.noised.sample_index]
    sign, weight = torch.where(is_liked, 1.0, -1.0).double(), torch.where(is_liked, 0.5, 2.0).double()
    assert 0 < is_liked.sum() < 14
    parameter = torch.tensor(0.7, dtype=torch.float64, requires_grad=True)
    x, target = batch.sample.double(), batch.target.double()
    error, reference = (((scale * x - target) ** 2).mean((1, 2, 3)) for scale in (parameter, 0.6))
    want = _kto(error, reference, sign, 3.0, weight)
    (want_grad,) = torch.autograd.grad(want.mean(), parameter)
    for values, grad in found:
        torch.testing.assert_close(values.double(), want, rtol=2e-5, atol=1e-7)
        torch.testing.assert_close(grad.double(), want_grad, rtol=2e-5, atol=1e-7)
    k = (reference - error).mean().clamp(min=0).item()
    assert loss.statistics["kl"].tolist() == pytest.approx([k] * 14, rel=1e-4, abs=1e-7)
    torch.testing.assert_close(ref_error, mean_square(0.6 * batch.sample - batch.target))


def test_rows_are_drawn_in_any_order(tmp_path: Path):
    for algorithm in (
        diffusion_dpo(preferences=str(write_pairs(tmp_path / "pairs"))),
        diffusion_kto(preferences=str(write_judged(tmp_path / "labels"))),
    ):
        rows, policy, *_ = _iteration(algorithm, 4)
        order = torch.tensor([2, 0, 3, 1])
        whole = algorithm.loss(policy, rows.take(torch.arange(4)), is_on_policy=True, scale=1.0).values
        mixed = algorithm.loss(policy, rows.ordered(order).take(slice(0, 4)), is_on_policy=True, scale=1.0).values
        torch.testing.assert_close(mixed, whole[order])
        assert len({*whole.tolist()}) > 1


def test_noise_levels_are_drawn_among_the_steps_kept_of_the_chosen_picture(tmp_path: Path):
    algorithm = diffusion_dpo(preferences=str(write_pairs(tmp_path)), num_draws=2)
    keep = torch.zeros(8, 5, dtype=torch.bool)
    keep[:4, 1:3] = True
    keep[0, 1] = False
    keep[4:, 4] = True
    rows, *_ = _iteration(algorithm, 4, keep)
    drawn = sorted(zip(rows.sample_index.tolist(), rows.better.step.tolist(), strict=True))
    assert drawn == [(0, 2), (1, 1), (1, 2), (2, 1), (2, 2), (3, 1), (3, 2)]


def test_no_pair_comes_twice_before_all_were_drawn(tmp_path: Path):
    algorithm = diffusion_dpo(preferences=str(write_pairs(tmp_path)), prompt_dropout=0.0)
    pairs = [record.prompt for record in algorithm.pairs.records]
    for seed in range(5):
        prompts = algorithm.draw(seed, 4)
        assert sorted(algorithm._records) == [0, 1, 2, 3]
        assert prompts == [pairs[number] for number in algorithm._records] * 2
        assert algorithm.draw(seed, 4) == prompts, "the seed decides"
        algorithm.draw(seed, 8)
        assert sorted(algorithm._records) == [0, 0, 1, 1, 2, 2, 3, 3]
    assert len({tuple(algorithm.draw(seed, 4)) for seed in range(5)}) > 1


def test_the_prompt_of_a_share_of_the_records_is_not_told(tmp_path: Path):
    algorithm = diffusion_dpo(preferences=str(write_pairs(tmp_path)), prompt_dropout=0.5)
    told = algorithm.draw(3, 1000)
    assert 0.45 < told[1000:].count("") / 1000 < 0.56
    _, _, stills, collector = _iteration(algorithm, 40)
    assert "" not in stills.prompts, "the interval is the prompt's own all the same"
    distinct = list(dict.fromkeys(collector.prompts))
    seen = [distinct[number] for number in stills.prompt_index.tolist()]
    assert seen[:40] == seen[40:], "of both pictures or of neither"
    assert all(one in ("", prompt) for one, prompt in zip(seen, stills.prompts, strict=True))
    assert 5 < seen[:40].count("") < 35


def test_liked_pictures_are_drawn_as_often_as_asked_whatever_their_share(tmp_path: Path):
    folder = str(write_judged(tmp_path))  # two thirds are liked
    for ratio in (0.2, 0.8):
        algorithm = diffusion_kto(preferences=folder, positive_ratio=ratio)
        algorithm.draw(5, 2000)
        liked = [algorithm.judged.records[number].is_liked for number in algorithm._records]
        assert abs(sum(liked) / 2000 - ratio) < 0.04
        assert len(set(algorithm._records)) == 6, "all of them in time"


def test_kto_needs_both_labels(tmp_path: Path):
    write_judged(tmp_path, 2)
    with pytest.raises(ValueError, match=r"got 2 in '.*' that are all liked; add the others"):
        diffusion_kto(preferences=str(tmp_path))


def test_captions_are_those_of_the_set(tmp_path: Path):
    algorithm = diffusion_dpo(preferences=str(write_pairs(tmp_path)))
    assert algorithm.preferences.prompts == [*CAPTIONS, CAPTIONS[0]]
    assert algorithm.needs_reference
    assert algorithm.train_guidance == "conditional"
