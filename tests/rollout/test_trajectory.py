"""Packing: what lands in a batch of (sample, step) pairs, in which order, and what cannot be packed."""

import pytest
import torch

from adascope_fast.backbone import take
from adascope_fast.rollout import StepBatch, Trajectory
from adascope_fast.schedules import Schedule
from adascope_fast.schedules import samplers as schedules

B, T = 3, 4
PATTERNS = {
    "ragged": [[0, 1, 1, 0], [0, 0, 0, 0], [1, 0, 0, 1]],
    "one pair": [[0, 0, 0, 0], [0, 0, 1, 0], [0, 0, 0, 0]],
    "all": [[1, 1, 1, 1]] * 3,
    "none": [[0, 0, 0, 0]] * 3,
}


def _every_step_trainable() -> Schedule:
    return schedules.dance_sde(torch.linspace(1, 0, T + 1), eta=0.3)


def _trajectory(schedule: Schedule | None = None) -> Trajectory:
    """Every latent holds the numbers (sample, state), so that a row tells where it came from."""
    sample = torch.arange(B).view(B, 1).expand(B, T + 1)
    state = torch.arange(T + 1).expand(B, T + 1)
    latents = torch.stack([sample, state], -1).float()
    log_prob = 10.0 * torch.arange(B).view(B, 1) + torch.arange(T)
    prompt_index = torch.tensor([2, 0, 1])
    return Trajectory(
        latents, latents[:, 1:], log_prob, schedule or _every_step_trainable(), ["x", "y", "z"], prompt_index
    )


def _packed(trajectory: Trajectory, keep: torch.Tensor) -> StepBatch:
    return trajectory.gather(trajectory.pairs(keep))


def _check(batch: StepBatch, expected: list[tuple[int, int]], schedule: Schedule) -> None:
    assert len(batch) == len(expected)
    for row, (sample, step) in enumerate(expected):
        assert batch.sample[row].tolist() == [sample, step]
        assert batch.prev_sample[row].tolist() == [sample, step + 1]
        assert batch.timestep[row] == schedule.timesteps[step]
        assert torch.equal(batch.coef[row], schedule.coef[step])
        assert batch.old_log_prob[row] == 10 * sample + step
        assert (batch.sample_index[row], batch.step_index[row]) == (sample, step)
        assert batch.prompt_index[row] == [2, 0, 1][sample]


@pytest.mark.parametrize("pattern", PATTERNS)
def test_a_batch_holds_the_kept_pairs_sample_by_sample(pattern: str):
    trajectory = _trajectory()
    expected = [(i, j) for i, row in enumerate(PATTERNS[pattern]) for j, kept in enumerate(row) if kept]
    _check(_packed(trajectory, torch.tensor(PATTERNS[pattern]).bool()), expected, trajectory.schedule)


def test_gather_keeps_the_order_it_is_given():
    trajectory = _trajectory()
    pairs = [(2, 3), (0, 0), (2, 3), (1, 2)]
    _check(trajectory.gather(torch.tensor(pairs)), pairs, trajectory.schedule)


def test_a_deterministic_step_is_refused_by_its_number():
    trajectory = _trajectory(schedules.flow_cps(torch.linspace(1, 0, T + 1), eta=0.7))
    keep = torch.zeros(B, T, dtype=torch.bool)
    keep[1, 2:] = True
    message = r"step 3 is deterministic \(std = 0\).*raise eta or noise_level, or keep the selector to steps 0\.\.2"
    with pytest.raises(ValueError, match=message):
        _packed(trajectory, keep)
    keep[1, 3] = False
    _check(_packed(trajectory, keep), [(1, 2)], trajectory.schedule)


def test_a_sampler_without_noise_leaves_no_step_to_keep():
    trajectory = _trajectory(schedules.flow_ode(torch.linspace(1, 0, T + 1)))
    with pytest.raises(ValueError, match=r"step 0 is deterministic .* keep the selector to steps none"):
        _packed(trajectory, torch.ones(B, T, dtype=torch.bool))


@pytest.mark.parametrize(("size", "lengths"), [(1, [1] * 12), (5, [5, 5, 2]), (12, [12]), (100, [12])])
def test_parts_of_a_batch_lose_nothing(size: int, lengths: list[int]):
    batch = _packed(_trajectory(), torch.ones(B, T, dtype=torch.bool))
    parts = [batch[rows] for rows in torch.arange(B * T).split(size)]
    assert [len(part) for part in parts] == lengths
    for name in {*vars(batch), "sample", "prev_sample"} - {"states"}:
        assert torch.equal(torch.cat([getattr(part, name) for part in parts]), getattr(batch, name))


def test_take_picks_rows_of_every_tensor_of_a_condition():
    condition = {"text": torch.arange(12).view(3, 2, 2), "pooled": torch.arange(3)}
    taken = take(condition, torch.tensor([2, 0, 2]))
    assert taken["pooled"].tolist() == [2, 0, 2]
    assert taken["text"][:, 0, 0].tolist() == [8, 0, 8]
