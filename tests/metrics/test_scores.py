import math
from collections.abc import Sequence

import pytest
import torch
import torch.nn.functional as F
from metric_images import Pixels, images, vector, with_features
from torch import Tensor

from adascope_fast.metrics import Sources
from adascope_fast.metrics.scores import ClipScore, ScoreOf
from adascope_fast.rewards import ClipSimilarity, jpeg_compressibility


def redness(images: Tensor, prompts: Sequence[str]) -> Tensor:
    return images[:, 0].mean((1, 2)) + torch.tensor([float(prompt == "more") for prompt in prompts])


def test_the_score_of_a_reward_is_its_mean():
    metric = ScoreOf(redness, "red", {"weights": "none"})
    given = torch.tensor([0.1, 0.3]).view(2, 1, 1, 1).expand(2, 3, 4, 4)
    metric.update(given, ["more", "less"])
    assert metric.compute() == pytest.approx(0.7)
    assert (metric.name, metric.facts(), metric.higher_is_better) == ("red", {"weights": "none"}, True)


def test_the_fields_other_signature_is_a_reward_too():
    metric = ScoreOf(lambda images, prompts, metadata: (images.mean((1, 2, 3)), {}))
    metric.update(torch.full((2, 3, 4, 4), 0.25), ["a", "b"])
    assert metric.compute() == pytest.approx(0.25)


def test_what_a_reward_raises_or_returns_wrongly_is_one_line():
    def fails(images: Tensor, prompts: Sequence[str]) -> Tensor:
        raise KeyError("no")

    with pytest.raises(ValueError, match="reward 'fails' raised KeyError"):
        ScoreOf(fails).update(torch.rand(1, 3, 4, 4), ["a"])
    with pytest.raises(ValueError, match="must be finite"):
        ScoreOf(lambda images, prompts: images.mean((1, 2, 3)) * math.nan).update(torch.rand(1, 3, 4, 4), ["a"])


def test_the_clip_score_is_the_bare_cosine():
    case = vector("clip_cosine")

    class Prompts:
        def embed_prompts(self, prompts: Sequence[str], device: torch.device) -> Tensor:
            return F.normalize(torch.tensor([case["b"]]), dim=1).expand(len(prompts), -1)

    metric = ClipScore(Pixels(), Prompts())
    metric.update(with_features(torch.tensor([case["a"]]) / 4), ["a"])
    assert metric.compute() == pytest.approx(case["cos"], rel=1e-6)


def test_the_clip_score_is_the_similarity_that_rewards_know():
    given, prompts = images(3, 40, 32), ["a red circle", "a large blue square", "a red circle"]
    sources = Sources(clip="scenes-clip")
    metric = ClipScore(sources.features("clip"), sources.clip())
    want = ClipSimilarity.load("scenes-clip")(given, prompts)
    torch.testing.assert_close(metric.rows(given, prompts), want, rtol=1e-5, atol=1e-6)
    assert len(set(want.tolist())) == 3


def test_embeddings_are_not_normalised():
    given, sources = images(3, 64, 64), Sources(clip="scenes-clip")
    found, clip = sources.features("clip")(given), sources.clip()
    with torch.no_grad():
        seen = clip.model.vision_model(pixel_values=(given - 0.5) / 0.5)
        want = clip.model.visual_projection(seen.pooler_output)
    torch.testing.assert_close(found, want, rtol=1e-5, atol=1e-6)
    assert not torch.allclose(found.norm(dim=1), torch.ones(3), rtol=0.05)


def test_a_built_in_reward_is_a_metric():
    metric = ScoreOf(jpeg_compressibility, "JPEG")
    metric.update(images(2, 16, 16), ["a", "b"])
    assert metric.compute() < 0
