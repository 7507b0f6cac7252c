"""What a `DDPOTrainer` does with prompts, rewards, hooks, overridden methods, selectors and odd schedulers."""

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from accelerate.tracking import GeneralTracker
from torch import Tensor, nn

from adascope_fast.compat.trl import (
    DDPOStableDiffusionPipeline,
    DDPOTrainer,
    DefaultDDPOStableDiffusionPipeline,
    DefaultDDPOStableDiffusionXLPipeline,
    PerPromptStatTracker,
)
from adascope_fast.engine.settings import Acceleration
from adascope_fast.selectors.simple import StaticRange
from adascope_fast.selectors.windows import FastWindow

Make = Callable[..., Any]


class Kept(GeneralTracker):
    name = "kept"
    requires_logging_directory = False

    def __init__(self) -> None:
        super().__init__()
        self.rows: list[dict[str, Any]] = []

    @property
    def tracker(self) -> None:
        return None

    def log(self, values: dict[str, Any], step: int | None = None, **ignored: Any) -> None:
        self.rows.append({"step": step, **values})


class OwnLoss(DDPOTrainer):
    """As the base, through both methods that a subclass may override."""

    calls = 0

    def calculate_loss(self, *args: Any) -> tuple[Tensor, Tensor, Tensor]:
        type(self).calls += 1
        return super().calculate_loss(*args)

    def loss(self, advantages: Tensor, clip_range: float, ratio: Tensor) -> Tensor:
        return super().loss(advantages, clip_range, ratio)


class Scaled(DDPOTrainer):
    def loss(self, advantages: Tensor, clip_range: float, ratio: Tensor) -> Tensor:
        return 0 * super().loss(advantages, clip_range, ratio)


def _weights(trainer: DDPOTrainer) -> Tensor:
    return torch.cat([one.detach().flatten() for one in trainer.trainable_layers]).clone()


def _change(trainer: DDPOTrainer, epochs: int = 2) -> Tensor:
    before = _weights(trainer)
    trainer.train(epochs=epochs)
    return _weights(trainer) - before


def _alike(got: Tensor, want: Tensor) -> None:
    assert want.norm() > 0
    assert torch.nn.functional.cosine_similarity(got.double(), want.double(), dim=0) > 0.99999
    torch.testing.assert_close(got.norm(), want.norm(), rtol=1e-3, atol=0)


CHOICES: dict[str, dict[str, Any]] = {
    "as it is": {},
    "two updates, two epochs": {
        "train_gradient_accumulation_steps": 1, "train_num_inner_epochs": 2, "train_clip_range": 0.1,
    },
    "a share of the steps": {"train_timestep_fraction": 0.7},
    "no guidance in training": {"train_cfg": False, "train_clip_range": 10.0},
    "no guidance at all": {"sample_guidance_scale": 1.0},
    "every weight": {"use_lora": False},
    "sdxl": {"model": "sdxl"},
    "some of the steps": {"selector": StaticRange(start=1, end=3)},
    "noise in a window alone": {"selector": FastWindow(window_size=2), "sample_num_steps": 4},
}  # fmt: skip


@pytest.mark.parametrize("name", CHOICES)
def test_an_overridden_loss_is_used_and_the_fast_way_has_its_numbers(make_trainer: Make, name: str):
    OwnLoss.calls = 0
    slow = make_trainer(trainer=OwnLoss, **CHOICES[name])
    assert "update: TRL's way: OwnLoss overrides calculate_loss and loss" in slow.explain()
    want = _change(slow)
    share = 2 if "steps" in name or "window" in name else 3
    assert OwnLoss.calls == 2 * 2 * share * CHOICES[name].get("train_num_inner_epochs", 1)
    fast = make_trainer(**CHOICES[name])
    assert "TRL's way" not in fast.explain()
    _alike(_change(fast), want)


def test_a_loss_that_is_replaced_on_the_trainer_is_used(make_trainer: Make):
    trainer = make_trainer(train_adam_weight_decay=0.0)
    trainer.loss = lambda advantages, clip_range, ratio: 0 * ratio.mean()
    assert "update: TRL's way: DDPOTrainer overrides loss" in trainer.explain()
    assert _change(trainer, epochs=1).abs().max() == 0


def test_an_update_without_steps_is_refused(make_trainer: Make):
    class First(StaticRange):
        def __call__(self, trajectory: Any, iteration: int) -> Tensor:
            keep = super().__call__(trajectory, iteration).clone()
            keep[1:] = False
            return keep

    trainer = make_trainer(selector=First(start=0, end=1), train_gradient_accumulation_steps=1)
    with pytest.raises(ValueError, match="an update needs at least one"):
        trainer.train(epochs=1)


def test_accelerations_are_honoured_or_refused(make_trainer: Make):
    plain = make_trainer(acceleration=Acceleration(fold_adapter="off", fused_optimizer="off", channels_last="off"))
    assert "folded in" not in plain.explain()
    assert not plain.optimizer.defaults["fused"]
    got = _change(plain)
    _alike(got, _change(make_trainer()))
    with pytest.raises(ValueError, match="cuda_graphs"):
        make_trainer(acceleration=Acceleration(cuda_graphs="on"))


def test_batches_change_no_result(make_trainer: Make):
    want = _change(make_trainer(train_gradient_accumulation_steps=1))
    parts = make_trainer(train_gradient_accumulation_steps=1, rollout_batch=3, microbatch=4)
    assert "rollout: up to 3 images" in parts.explain()
    assert "update: up to 4 (image, step) pairs" in parts.explain()
    _alike(_change(parts), want)


def test_where_memory_runs_out_batches_are_halved(make_trainer: Make, monkeypatch: pytest.MonkeyPatch):
    want = _change(make_trainer())
    trainer = make_trainer()
    whole = trainer._backbone.predict

    def predict(sample: Tensor, *told: Any) -> Tensor:
        if len(sample) > 6:
            raise torch.OutOfMemoryError("too large")
        return whole(sample, *told)

    monkeypatch.setattr(trainer._backbone, "predict", predict)
    _alike(_change(trainer), want)
    assert "rollout: up to 2 images" in trainer.explain()
    assert "update: up to 2 (image, step) pairs" in trainer.explain()


def test_a_loss_alone_may_be_overridden(make_trainer: Make):
    trainer = make_trainer(trainer=Scaled, train_adam_weight_decay=0.0)
    assert "update: TRL's way: Scaled overrides loss" in trainer.explain()
    assert _change(trainer, epochs=1).abs().max() == 0


@pytest.mark.parametrize("settings", [{"clip_sample": True}, {"thresholding": True, "clip_sample": False}])
def test_a_scheduler_that_clips_is_trained_as_trl_does(
    make_trainer: Make, tiny_folder: Callable[[str], Path], settings: dict[str, Any]
):
    def pipeline() -> Any:
        made = DefaultDDPOStableDiffusionPipeline(str(tiny_folder("sd")))
        made.sd_pipeline.scheduler = type(made.scheduler).from_config(made.scheduler.config, **settings)
        return made

    choices: dict[str, Any] = {"train_gradient_accumulation_steps": 1, "train_clip_range": 0.1}
    fast = make_trainer(pipeline=pipeline(), **choices)
    assert "rollout: TRL's way: the scheduler clips" in fast.explain()
    assert "the step in plain PyTorch" in fast.explain()
    got = _change(fast)
    _alike(got, _change(make_trainer(trainer=OwnLoss, pipeline=pipeline(), **choices)))


class Borrowed(DDPOStableDiffusionPipeline):
    """A pipeline of somebody's own: TRL's interface, and nothing else of this package's."""

    use_lora = True

    def __init__(self, inner: Any) -> None:
        self.inner = inner

    unet = property(lambda self: self.inner.unet)
    vae = property(lambda self: self.inner.vae)
    tokenizer = property(lambda self: self.inner.tokenizer)
    scheduler = property(lambda self: self.inner.scheduler)
    text_encoder = property(lambda self: self.inner.text_encoder)
    autocast = property(lambda self: None)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.inner(*args, **kwargs)

    def scheduler_step(self, *args: Any, **kwargs: Any) -> Any:
        return self.inner.scheduler_step(*args, **kwargs)

    def set_progress_bar_config(self, *args: Any, **kwargs: Any) -> None:
        self.inner.set_progress_bar_config(*args, **kwargs)

    def get_trainable_layers(self) -> Any:
        return self.inner.get_trainable_layers()


def test_a_pipeline_of_ones_own_is_trained_through_its_methods(make_trainer: Make, tiny_folder: Callable[[str], Path]):
    own = Borrowed(DefaultDDPOStableDiffusionPipeline(str(tiny_folder("sd"))))
    trainer = make_trainer(pipeline=own)
    assert "Borrowed is no pipeline of this package" in trainer.explain()
    _alike(_change(trainer), _change(make_trainer()))
    with pytest.raises(ValueError, match="a selector looks at a rollout of this engine"):
        make_trainer(pipeline=Borrowed(DefaultDDPOStableDiffusionPipeline(str(tiny_folder("sd")))), selector="adascope")


def test_layers_of_a_subclass_are_what_is_trained(make_trainer: Make, tiny_folder: Callable[[str], Path]):
    class Attention(DefaultDDPOStableDiffusionPipeline):
        def get_trainable_layers(self) -> list[nn.Parameter]:
            return [one for name, one in self.unet.named_parameters() if name.endswith("to_q.weight")]

    pipeline = Attention(str(tiny_folder("sd")), use_lora=False)
    trainer = make_trainer(pipeline=pipeline)
    before = {name: value.clone() for name, value in pipeline.unet.state_dict().items()}
    trainer.train(epochs=1)
    moved = {name for name, value in pipeline.unet.state_dict().items() if not torch.equal(value, before[name])}
    assert moved
    assert all(name.endswith("to_q.weight") for name in moved)


def test_rewards_and_hook_are_given_what_trl_gives(make_trainer: Make):
    seen, hooked = [], []

    def reward(images: Tensor, prompts: tuple[str, ...], metadata: tuple[Any, ...]) -> tuple[list[float], dict]:
        seen.append((images, prompts, metadata))
        return [float(len(seen)), -1.0], {"calls": len(seen)}

    tracker = Kept()
    trainer = make_trainer(reward=reward, hook=lambda *given: hooked.append(given), log_with=tracker)
    trainer.train(epochs=1)
    assert len(seen) == 2
    for images, prompts, metadata in seen:
        assert images.shape == (2, 3, 16, 16)
        assert images.dtype == torch.float32
        assert images.min() >= 0
        assert images.max() <= 1
        assert prompts == ("a red circle", "a blue square")
        assert metadata == ({"number": 1}, {"number": 1})
    ((batches, step, first),) = hooked
    assert step == 0
    assert first is tracker
    assert [len(batch) for batch in batches] == [5, 5]
    assert torch.equal(batches[1][0], seen[1][0])
    assert batches[1][3].tolist() == [2.0, -1.0]
    assert batches[1][4] == {"calls": 2}
    told = next(row for row in tracker.rows if "reward" in row)
    assert told["reward"].tolist() == [1.0, -1.0, 2.0, -1.0]
    assert told["reward_mean"] == pytest.approx(0.25)
    assert told["reward_std"] == pytest.approx(np.std([1, -1, 2, -1]))


def test_without_a_tracker_the_hook_has_one_that_keeps_nothing(make_trainer: Make):
    trackers = []
    make_trainer(hook=lambda data, step, tracker: trackers.append(tracker)).train(epochs=1)
    assert trackers[0].log_images({"a": 1}, step=0) is None
    assert trackers[0].log({"a": 1}) is None


REWARDS: list[tuple[Any, str]] = [
    ((torch.ones(1), {}), "one reward for each image, got 2 for 4"),
    ((torch.tensor([1.0, float("nan")]), {}), "rewards must be finite, got nan for image 1"),
    (torch.ones(2), r"must return \(rewards, metadata\), got Tensor"),
]


@pytest.mark.parametrize(("returned", "told"), REWARDS)
def test_rewards_that_cannot_be_are_refused(make_trainer: Make, returned: Any, told: str):
    with pytest.raises(ValueError, match=told):
        make_trainer(reward=lambda *given: returned).train(epochs=1)


def test_scoring_in_threads_changes_nothing(make_trainer: Make):
    want = _change(make_trainer())
    assert torch.equal(_change(make_trainer(async_reward_computation=True, max_workers=2)), want)


def test_integer_rewards_are_not_cut(make_trainer: Make):
    tracker = PerPromptStatTracker(4, 2)
    advantages = tracker.update(["a", "a", "b"], [1, 2, 9])
    assert advantages[:2] == pytest.approx([-1, 1], rel=1e-4)
    assert advantages[2] == pytest.approx((9 - 4) / np.std([1, 2, 9]), rel=1e-4)
    assert tracker.get_stats()["a"] == {"mean": 1.5, "std": 0.5, "count": 2}


def test_adascope_trains_a_part_of_the_steps(make_trainer: Make):
    fraction = []

    class Counted(DDPOTrainer):
        def _train_batched_samples(self, inner_epoch: int, epoch: int, global_step: int, batched_samples: Any) -> int:
            fraction.append(torch.cat([one["keep"] for one in batched_samples]).float().mean().item())
            return super()._train_batched_samples(inner_epoch, epoch, global_step, batched_samples)

    trainer = make_trainer(model="scenes", trainer=Counted, selector="adascope", sample_num_steps=10)
    assert "steps: AdaScope" in trainer.explain()
    assert _change(trainer, epochs=1).norm() > 0
    assert 0.2 <= fraction[0] <= 0.8


def test_the_share_of_steps_is_drawn_for_each_image(make_trainer: Make):
    columns = []

    class Seen(DDPOTrainer):
        def _train_batched_samples(self, inner_epoch: int, epoch: int, global_step: int, batched_samples: Any) -> int:
            columns.extend(row.tolist() for one in batched_samples for row in one["timesteps"])
            return super()._train_batched_samples(inner_epoch, epoch, global_step, batched_samples)

    make_trainer(trainer=Seen, train_timestep_fraction=0.7).train(epochs=1)
    assert all(sorted(row) == [1, 334, 667] for row in columns)
    assert len({tuple(row) for row in columns}) > 1


def test_steps_without_noise_are_left_out_and_told(
    make_trainer: Make, tiny_folder: Callable[[str], Path], caplog: pytest.LogCaptureFixture
):
    pipeline = DefaultDDPOStableDiffusionPipeline(str(tiny_folder("sd")))
    pipeline.sd_pipeline.scheduler = type(pipeline.scheduler).from_config(pipeline.scheduler.config, steps_offset=0)
    with caplog.at_level(logging.WARNING):
        trainer = make_trainer(pipeline=pipeline)
    assert "steps [2] have no noise" in caplog.text
    assert _change(trainer, epochs=1).isfinite().all()


def test_the_negative_prompt_guides_away(make_trainer: Make):
    plain, other = make_trainer(), make_trainer(negative_prompts="blue, square")
    assert not torch.equal(plain.neg_prompt_embed, other.neg_prompt_embed)
    want = other._embedded(["blue, square"])[1]
    torch.testing.assert_close(other.neg_prompt_embed, want)


def test_settings_reach_the_optimiser(make_trainer: Make):
    fields = {"train_learning_rate": 2e-3, "train_adam_beta1": 0.8, "train_adam_beta2": 0.9}
    fields |= {"train_adam_weight_decay": 0.5, "train_adam_epsilon": 1e-3}
    (group,) = make_trainer(**fields).optimizer.param_groups
    assert [group[name] for name in ("lr", "betas", "weight_decay", "eps")] == [2e-3, (0.8, 0.9), 0.5, 1e-3]


def test_gradients_are_scaled_down_to_their_largest_norm(make_trainer: Make):
    norms = []

    def step_of(optimizer: Any) -> Any:
        def step() -> None:
            parameters = optimizer.param_groups[0]["params"]
            norms.append(torch.stack([one.grad.norm() for one in parameters]).norm().item())

        return step

    trainer = make_trainer(train_max_grad_norm=1e-3)
    trainer.optimizer.step = step_of(trainer.optimizer)
    trainer.train(epochs=1)
    assert norms == [pytest.approx(1e-3, rel=1e-3)]


def test_advantages_are_clipped(make_trainer: Make):
    kept = Kept()
    make_trainer(train_adv_clip_max=0.0, log_with=kept).train(epochs=1)
    assert kept.rows[-1]["loss"] == 0


@pytest.mark.parametrize(
    ("name", "kind"), [("sd", DefaultDDPOStableDiffusionPipeline), ("sdxl", DefaultDDPOStableDiffusionXLPipeline)]
)
def test_images_of_the_pipeline_are_those_of_diffusers(tiny_folder: Callable[[str], Path], name: str, kind: Any):
    pipeline = kind(str(tiny_folder(name)))
    pipeline.set_progress_bar_config(disable=True)
    settings: dict[str, Any] = dict(num_inference_steps=4, guidance_scale=3.0, negative_prompt="blue", output_type="pt")
    ours = pipeline("a red circle", generator=torch.Generator().manual_seed(1), **settings)
    want = pipeline.sd_pipeline("a red circle", generator=torch.Generator().manual_seed(1), **settings).images
    torch.testing.assert_close(ours.images, want, rtol=1e-4, atol=1e-4)
    assert len(ours.latents) == 5
    assert len(ours.log_probs) == 4
    with pytest.raises(NotImplementedError, match="AlignProp"):
        pipeline.rgb_with_grad()
