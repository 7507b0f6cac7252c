"""Where metrics have their networks from: each is loaded once, and sees a batch of images once.

WEIGHTS is a folder with one folder a network: `pick_score`, `aesthetic`, `image_reward`, `hpsv2`, `clip`, `inception`,
`vgg16`, `dinov2`; `adascope-fast import-weights` makes those whose publishers have no safetensors. The network of
ST-LPIPS comes with a package. Nothing is downloaded but a `clip` that is named by its repository.

Axes: `n` images, `k` features.
"""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from adascope_fast.loading import align, load_whole
from adascope_fast.metrics import lpips
from adascope_fast.metrics.inception import InceptionV3
from adascope_fast.metrics.metric import Unavailable
from adascope_fast.metrics.vgg import MEAN, SIZE, STD, Vgg16
from adascope_fast.rewards.clip import ClipSimilarity, prepared
from adascope_fast.settings import imported
from adascope_fast.weights import st_lpips

PUBLISHED = {
    "pick_score": "yuvalkirstain/PickScore_v1",
    "clip": "openai/clip-vit-large-patch14",
    "dinov2": "facebook/dinov2-base",
}
"""Hugging Face repositories that hold a network in safetensors."""


class Features:
    """Images [n, 3, h, w] in [0, 1] to features [n, k], float32; those of the last batch are kept.

    Args:
        name: the network.
        function: what computes them for a part of a batch, on `device`.
        facts: what a reader must know: network, layer, weights.
        least: pixels of the shorter side that it needs.
    """

    def __init__(
        self,
        name: str,
        function: Callable[[Tensor], Tensor],
        *,
        facts: Mapping[str, Any],
        device: torch.device,
        batch: int,
        least: int = 1,
    ) -> None:
        self.name, self.facts, self.least = name, dict(facts), least
        self._function, self._device, self._batch = function, device, batch
        self._seen: tuple[Tensor, int, Tensor] | None = None

    @torch.no_grad()
    def __call__(self, images: Tensor) -> Tensor:
        version = 0 if images.is_inference() else images._version  # rises where it is changed in place
        if self._seen is None or self._seen[0] is not images or self._seen[1] != version:
            parts = images.split(self._batch)
            found = torch.cat([self._function(part.to(self._device, torch.float32)).float() for part in parts])
            self._seen = images, version, found
        return self._seen[2]


class Sources:
    """The networks of metrics.

    Args:
        weights: the folder WEIGHTS; None: there is none, and what the Hugging Face cache holds is taken from there.
        clip: the CLIP of the CLIP score and TCE: a folder, a repository, or `scenes-clip`; None: WEIGHTS/clip.
        device: where networks compute.
        dtype: of the preference models; the others are float32.
        batch: images that a network takes at once; no result depends on it.
    """

    def __init__(
        self,
        weights: Path | None = None,
        clip: str | None = None,
        device: str | torch.device = "cpu",
        dtype: str | torch.dtype = "float32",
        batch: int = 32,
    ) -> None:
        self.weights = None if weights is None else Path(weights)
        self.clip_name, self.device, self.batch = clip, torch.device(device), batch
        self.dtype = str(dtype).removeprefix("torch.")
        self._made: dict[str, Any] = {}

    def folder(self, name: str, needs: str) -> Path:
        """The folder of a network's weights.

        Args:
            needs: what needs it, for an error.

        Raises:
            Unavailable: there is none.
        """
        published = PUBLISHED.get(name)
        if self.weights is not None:
            place = self.weights / name
            if place.is_dir():
                return place
            how = f"download {published} into it" if published else f"adascope-fast import-weights {name} makes it"
            raise Unavailable(f"{needs} needs the folder {place}, which is not there; {how}")
        cached = _cached(published) if published else None
        if cached is None:
            nor = f", nor is {published} in the Hugging Face cache" if published else ""
            raise Unavailable(
                f"{needs} needs the weights of {name}, and no folder of weights is named{nor}; name the one that has "
                f"{name} in it"
            )
        return cached

    def reward(self, section: str, folder: str, needs: str, **folders: str) -> Any:
        """A preference model as a reward.

        Args:
            section: its class in `rewards.settings`.
            folder: of its weights.
            folders: of others that it needs, by key.
        """
        keys = {key: str(self.folder(name, needs)) for key, name in ({"model": folder} | folders).items()}
        settings = imported(f"adascope_fast.rewards.settings:{section}")
        return settings(**keys, dtype=self.dtype, device=str(self.device), batch=self.batch).build()

    def clip(self, needs: str = "the CLIP score") -> ClipSimilarity:
        """The CLIP of the CLIP score."""
        if "clip model" not in self._made:
            name = self.clip_name
            if name is None:
                try:
                    name = str(self.folder("clip", needs))
                except Unavailable as error:
                    raise Unavailable(f'{error}; or choose another CLIP, as clip="scenes-clip"') from None
            self._made["clip model"] = ClipSimilarity.load(name)
        return self._made["clip model"]

    def distance(self, trunk: st_lpips.Trunk = "alex", needs: str = "ST-LPIPS") -> lpips.Distance:
        """ST-LPIPS of AlexNet or VGG-16."""
        if f"distance {trunk}" not in self._made:
            if st_lpips.find(trunk) is None:
                raise Unavailable(
                    f"{needs} needs the package {st_lpips.PACKAGE}, which is not installed; "
                    f"pip install 'adascope-fast[metrics]'"
                )
            self._made[f"distance {trunk}"] = lpips.Distance(trunk, self.device, self.batch)
        return self._made[f"distance {trunk}"]

    def inception(self, needs: str = "FID") -> InceptionV3:
        """The Inception-v3 of FID."""
        if "inception model" not in self._made:
            network = InceptionV3.load(_only_file(self.folder("inception", needs)))
            align(network)
            self._made["inception model"] = network.to(self.device)
        return self._made["inception model"]

    def features(self, name: str, needs: str | None = None) -> Features:
        """What a network says of images: `clip`, `vgg16`, `inception` or `dinov2`.

        Args:
            needs: what needs them, for an error; None: the name.

        Raises:
            Unavailable: its weights are not there.
            ValueError: there is no network of that name, or its files are damaged.
        """
        makers = {"clip": self._clip, "vgg16": self._vgg16, "inception": self._inception, "dinov2": self._dinov2}
        if name not in makers:
            raise ValueError(f"features must be of {', '.join(makers)}, got {name!r:.80}; choose one of them")
        if name not in self._made:
            self._made[name] = makers[name](needs or f"features of {name}")
        return self._made[name]

    def _clip(self, needs: str) -> Features:
        clip = self.clip(needs)
        size = clip.model.config.vision_config.image_size
        clip.model.to(self.device)

        def embeddings(images: Tensor) -> Tensor:
            pixels = prepared(images, size, clip._mean, clip._std)
            found = clip.model.get_image_features(pixel_values=pixels)
            return found if isinstance(found, Tensor) else found.pooler_output  # transformers 5 wraps it

        named = self.clip_name or ("clip" if self.weights is not None else PUBLISHED["clip"])
        return self._as_features("clip", embeddings, {"network": "CLIP", "weights": named})

    def _vgg16(self, needs: str) -> Features:
        if self.weights is not None and (self.weights / "vgg16").is_dir():
            network = Vgg16.load(_only_file(self.weights / "vgg16"))
            align(network)
            facts = {"network": "VGG-16", "layer": "fc2", "weights": "vgg16"}
            return self._as_features("vgg16", network.to(self.device), facts)
        trunk = self.distance("vgg", needs).trunk
        facts = {"network": "VGG-16 of ST-LPIPS", "layer": "conv5_3, mean over places", "weights": st_lpips.PACKAGE}
        return self._as_features("vgg16", lambda images: trunk(images)[-1].mean((2, 3)), facts, lpips.LEAST)

    def _inception(self, needs: str) -> Features:
        facts = {"network": "Inception-v3 of 2015-12-05", "layer": "pool3", "weights": "inception"}
        return self._as_features("inception", self.inception(needs), facts)

    def _dinov2(self, needs: str) -> Features:
        from transformers import Dinov2Model

        folder = self.folder("dinov2", needs)
        model = load_whole(Dinov2Model, folder, "DINOv2", trust_remote_code=False, dtype=torch.float32)
        align(model)
        model.requires_grad_(False).eval().to(self.device)

        def first(images: Tensor) -> Tensor:
            return model(pixel_values=prepared(images, SIZE, MEAN, STD)).pooler_output

        return self._as_features("dinov2", first, {"network": "DINOv2", "layer": "class token", "weights": "dinov2"})

    def _as_features(
        self, name: str, function: Callable[[Tensor], Tensor], facts: Mapping[str, Any], least: int = 1
    ) -> Features:
        return Features(name, function, facts=facts, device=self.device, batch=self.batch, least=least)


def _only_file(folder: Path) -> Path:
    files = sorted(folder.glob("*.safetensors"))
    if len(files) != 1:
        raise ValueError(
            f"{folder} must hold one file of safetensors, got {len(files)}; "
            f"make it by adascope-fast import-weights {folder.name}"
        )
    return files[0]


def _cached(repository: str) -> Path | None:
    """The folder in the Hugging Face cache that holds a repository; nothing is downloaded."""
    from huggingface_hub import try_to_load_from_cache

    found = try_to_load_from_cache(repository, "config.json")
    return Path(found).parent if isinstance(found, str) else None
