"""Step-aware preference models: the pairs, the noise, what is learned from them, and the folder."""

import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from adascope_fast import schedules
from adascope_fast.preferences import RatedImages, StepAwareModel, fit, held_out_accuracy
from adascope_fast.rollout import Candidates, EncodedPrompts

T = 6


def _judged(seed: int, rewards: Callable[[Tensor, Tensor], Tensor], count: int = 160) -> RatedImages:
    """Random latents of four prompts, of which each is told by one number."""
    generator = torch.Generator().manual_seed(seed)
    clean = torch.randn(count, 3, 5, 5, generator=generator)
    index = torch.arange(count) % 4
    condition = {"text": torch.eye(4).unsqueeze(1).repeat(1, 3, 1), "pooled": torch.eye(4)[:, :2]}
    schedule = schedules.flow_sde(torch.linspace(1, 0, T + 1), noise_level=0.7)
    return RatedImages(clean, rewards(clean, index), index, condition, schedule)


def _model(**keys: Any) -> StepAwareModel:
    torch.manual_seed(0)
    return StepAwareModel("toy", (3, 5, 5), {"text": 4, "pooled": 2}, width=16, **keys)


def _sign(clean: Tensor, index: Tensor) -> Tensor:
    """The first channel's mean, whose worth the prompt decides."""
    return torch.where(index % 2 == 0, 1.0, -1.0) * clean[:, 0].mean((1, 2))


def test_every_two_images_of_a_prompt_that_differ_are_a_pair():
    judged = _judged(0, lambda clean, index: torch.tensor([1.0, 2.0, 3.0, 4.0, 1.0, 5.0, 0.0, 4.0]), count=8)
    # Prompt 0 has images 0 and 4 (a tie), 1 has 1 and 5, 2 has 2 and 6, 3 has 3 and 7 (a tie).
    assert judged.pairs().tolist() == [[2, 6], [5, 1]]


def test_images_are_noised_as_the_states_that_steps_lead_to_and_the_last_is_the_image():
    judged = _judged(0, _sign, count=8)
    noise = torch.randn(8, 3, 5, 5, generator=torch.Generator().manual_seed(1))
    for state in range(T):
        one = judged.noised(torch.arange(8), torch.full((8,), state), noise)
        sigma = 1 - (state + 1) / T
        assert one.timestep.tolist() == pytest.approx([1000 * sigma] * 8, abs=1e-3)
        torch.testing.assert_close(one.sample, (1 - sigma) * judged.clean + sigma * noise, rtol=1e-4, atol=1e-5)
    assert one.sample.equal(judged.clean)
    assert one.condition["text"].equal(judged.condition["text"][judged.prompt_index])


def test_it_learns_what_depends_on_the_prompt_and_tells_less_in_noise():
    model, generator = _model(), torch.Generator().manual_seed(0)
    losses: list[float] = []
    trained, held_out = _judged(0, _sign), _judged(1, _sign)
    before, count = held_out_accuracy(model, held_out, batch=512, generator=generator)
    assert count == 4 * 40 * 39 // 2
    fit(
        model, trained, num_steps=150, batch=32, learning_rate=5e-3, generator=generator,
        on_step=lambda step, loss: losses.append(loss),
    )  # fmt: skip
    after, _ = held_out_accuracy(model, held_out, batch=512, generator=generator)
    assert len(losses) == 150
    assert abs(before[-1] - 0.5) < 0.25
    assert after[-1] > 0.75
    assert after[0] < after[-1] - 0.1
    assert not any(parameter.requires_grad for parameter in model.parameters())


def test_images_without_a_difference_are_refused():
    judged = _judged(0, lambda clean, index: torch.zeros(len(clean)), count=8)
    with pytest.raises(ValueError, match="images of a prompt that the reward tells apart, got none"):
        fit(_model(), judged, num_steps=1, batch=2, learning_rate=1e-3, generator=torch.Generator())


def _candidates(count: int = 6) -> Candidates:
    generator = torch.Generator().manual_seed(4)
    sample = torch.randn(count, 3, 5, 5, generator=generator)
    condition = {"text": torch.randn(count, 3, 4, generator=generator), "pooled": torch.randn(count, 2)}
    return Candidates(sample, torch.linspace(0, 900, count), condition, ["a"] * count, lambda: sample)


def test_the_score_of_a_state_is_its_own_and_depends_on_latents_timestep_and_prompt():
    model, given = _model().eval(), _candidates()
    scores = model(given)
    for row in (0, 3):
        one = slice(row, row + 1)
        condition = {name: value[one] for name, value in given.condition.items()}
        alone = Candidates(given.sample[one], given.timestep[one], condition, ["a"], given.clean)
        torch.testing.assert_close(model(alone), scores[one], rtol=1e-5, atol=1e-6)
    others = [
        Candidates(given.sample.flip(0), given.timestep, given.condition, given.prompts, given.clean),
        Candidates(given.sample, given.timestep + 50, given.condition, given.prompts, given.clean),
        Candidates(given.sample, given.timestep, given.condition | {"text": -given.condition["text"]}, [], given.clean),
        Candidates(
            given.sample, given.timestep, given.condition | {"pooled": -given.condition["pooled"]}, [], given.clean
        ),
    ]
    for other in others:
        assert (model(other) - scores).abs().min() > 1e-6


def test_a_folder_gives_the_same_scores_and_what_was_told(tmp_path: Path):
    model = _model(told={"reward": "redness"}).eval()
    model.save(tmp_path / "one")
    loaded = StepAwareModel.load(tmp_path / "one")
    given = _candidates()
    assert loaded(given).equal(model(given))
    assert loaded.told == {"reward": "redness"}
    assert (loaded.model, loaded.latent_shape, loaded.embedding) == ("toy", (3, 5, 5), {"pooled": 2, "text": 4})
    assert (tmp_path / "one" / "config.json").stat().st_mode == (tmp_path / "one" / "model.safetensors").stat().st_mode


@pytest.mark.parametrize(
    "change",
    [
        {"latent_shape": [3, 5]},
        {"latent_shape": "large"},
        {"width": -1},
        {"width": 8},
        {"embedding": {"text": 4}},
        {"embedding": 4},
        {"kind": "a picture"},
    ],
)
def test_a_description_that_does_not_fit_is_refused_in_a_line(tmp_path: Path, change: dict[str, Any]):
    _model().save(tmp_path)
    described = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(described | change))
    with pytest.raises(ValueError, match="could not be read: ") as raised:
        StepAwareModel.load(tmp_path)
    assert "\n" not in str(raised.value)


def test_it_suits_the_model_that_it_was_made_for(make_toy: Callable):
    toy = make_toy()

    def suit(**other: Any) -> None:
        keys: dict[str, Any] = {"model": "toy", "latent_shape": (2, 3, 3), "embedding": {"text": 3}, **other}
        StepAwareModel(**keys).suit(toy)

    suit()
    for key, value, told in (
        ("model", "other", "the model that it was trained on, other, got toy"),
        ("latent_shape", (2, 4, 4), r"the latents that it was trained on, \[2, 4, 4\], got \[2, 3, 3\]"),
        ("embedding", {"text": 4}, "the embedding that it was trained on, {'text': 4}, got {'text': 3}"),
    ):
        with pytest.raises(ValueError, match=told):
            suit(**{key: value})


def test_judged_of_images_knows_their_prompts(make_toy: Callable):
    toy: Any = make_toy()
    prompts = ["see", "a red one", "see"]
    encoded = EncodedPrompts.of(toy, ["a red one", "see"])
    judged = RatedImages.of(torch.zeros(3, 2, 3, 3), torch.zeros(3), prompts, encoded, toy.schedule(T))
    assert judged.prompt_index.tolist() == [1, 0, 1]
    assert SimpleNamespace(**judged.condition).text.equal(toy.encode(["a red one", "see"])["text"])
