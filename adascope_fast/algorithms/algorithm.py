"""The seam between an algorithm and the engine: three small things that an algorithm owns, and what it is given.

1. `collect`: how samples come about. The default is a trajectory for each prompt that is asked for (repeat a prompt for
   a group); one that needs pairs, branches or an offline set asks for other ones or makes them.
2. `batch`: what of the samples an update trains on, as rows that can be drawn one by one, some of them without effect.
3. `loss`: the loss of some rows, unreduced, with what is worth telling of each.

Axes: `b` samples, `t` steps, `n` rows. The selector is not the algorithm's business: it says which steps of which
samples are kept, and an algorithm trains these, or draws its noise levels among them.
"""

import itertools
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from jaxtyping import Bool, Float, Float32, Int64
from torch import Tensor, nn

from adascope_fast.backbone import Backbone
from adascope_fast.distributed import Ranks
from adascope_fast.reference import Kind
from adascope_fast.rollout import Branches, OwnNoise, PreferenceModel, Stills, StoredImage, Trajectory
from adascope_fast.schedules import Schedule


@dataclass(frozen=True)
class Samples:
    """What an iteration has collected."""

    trajectory: Trajectory
    rewards: Float32[Tensor, " b"]
    branches: Branches | None = None
    """Of a branched rollout."""
    parts: dict[str, Float32[Tensor, " b"]] = field(default_factory=dict)
    """Of a reward that is the weighted sum of several: the scores of each, by name."""
    weights: dict[str, float] = field(default_factory=dict)
    """What each part is weighed by; 1 where it is not in here."""

    @property
    def prompts(self) -> list[str]:
        """The prompt of each sample."""
        return self.trajectory.prompts


class Collector(Protocol):
    """What the engine offers to `collect`: rollouts with its batches, its memory and its accelerations."""

    prompts: list[str]
    """The iteration's prompts, one a sample."""
    policy: "Policy"
    """The model that samples are drawn from."""
    num_updates: int
    """Updates that the iteration will make."""
    schedule: Schedule

    def __call__(self, prompts: list[str] | None = None) -> Samples:
        """A trajectory and a reward for each prompt; None: for `prompts`."""
        ...

    def branched(
        self,
        where: Bool[Tensor, " t"],
        *,
        num_candidates: int,
        margin: float,
        temperature: float,
        preference: PreferenceModel | None,
    ) -> Samples:
        """The same for the iteration's prompts, with `branches` at these steps; see `rollout.Branching`.

        Steps that the selector is known not to keep are not branched.

        Args:
            preference: scores candidates; None: the reward of the decoded guess from each.
        """
        ...

    def stills(self, images: Sequence[StoredImage], prompts: list[str], told: list[str]) -> Stills:
        """Pictures of a set in place of a rollout's, with the prompt of each, and what the denoiser is told of it.

        Prompts and what is told are among `self.prompts`.
        """
        ...


class Preferences(Protocol):
    """A set of pictures that people, or a reward, have judged."""

    @property
    def prompts(self) -> list[str]:
        """The prompt of each record."""
        ...

    @property
    def name(self) -> str:
        """What it is, in words."""
        ...

    @property
    def digest(self) -> str:
        """What tells it from another."""
        ...

    def refuse_small(self, side: int) -> None:
        """ValueError where a picture is too small for a model whose pictures have this side."""
        ...


class Policy(Protocol):
    """The model under training, as a loss sees it. Rows are samples with a timestep and a prompt each."""

    schedule: Schedule
    guidance_scale: float
    train_guidance: str
    """Outputs that carry gradient: "both", or the "conditional" one alone."""

    def outputs(
        self, sample: Float[Tensor, "n *latent"], timestep: Float[Tensor, " n"], prompt_index: Int64[Tensor, " n"]
    ) -> tuple[Float[Tensor, "n *latent"], Float[Tensor, "n *latent"] | None]:
        """(conditional, unconditional) model output, which the loss may differentiate; None without guidance."""
        ...

    def output(
        self, sample: Float[Tensor, "n *latent"], timestep: Float[Tensor, " n"], prompt_index: Int64[Tensor, " n"]
    ) -> Float[Tensor, "n *latent"]:
        """The conditional output alone, which the loss may differentiate."""
        ...

    def reference(
        self,
        sample: Float[Tensor, "n *latent"],
        timestep: Float[Tensor, " n"],
        prompt_index: Int64[Tensor, " n"],
        *,
        is_guided: bool = True,
    ) -> Float[Tensor, "n *latent"]:
        """The reference policy's output, without gradient; guided as the sampler is, or the conditional one."""
        ...

    def frozen(
        self, sample: Float[Tensor, "n *latent"], timestep: Float[Tensor, " n"], prompt_index: Int64[Tensor, " n"]
    ) -> Float[Tensor, "n *latent"]:
        """The conditional output with the weights as they are now, without gradient."""
        ...

    def decode(self, latents: Float[Tensor, "n *latent"]) -> Float[Tensor, "n 3 h w"]:
        """Pictures in [0, 1] of latents, noisy ones too, without gradient."""
        ...

    def condition(self) -> dict[str, Tensor]:
        """The encoded prompts, a row for each distinct one; `Trajectory.prompt_index` counts them."""
        ...

    def parameters(self) -> list[nn.Parameter]:
        """What is trained."""
        ...


@dataclass(frozen=True)
class Context:
    """What `batch` is given besides the samples."""

    policy: Policy
    keep: Bool[Tensor, "b t"]
    """The steps that are trained, or among which noise levels are drawn; on the device."""
    generator: torch.Generator
    gains: Callable[[], Tensor | None] = lambda: None
    """What each step added to the sensed preference, [b, t]; None if it was not sensed."""
    num_updates: int = 1
    """Updates that will be made of the rows; before all but the first the policy has moved."""
    microbatch: int = 64
    """Rows of a denoiser call."""
    ranks: Ranks = field(default_factory=Ranks)
    """The processes of the run."""
    noise: OwnNoise = field(default_factory=lambda: OwnNoise(0))
    """For the rows of the batch, by their numbers."""

    def of_all(self, rows: "Rows", compute: Callable[[Any], Tensor]) -> Float[Tensor, "*k n"]:
        """What `compute` gives [*k, m] of `Rows.take`, for all rows: in microbatches, on each rank a share of them."""
        count, ranks = len(rows), self.ranks
        every = torch.arange(count, device=self.keep.device)
        bounds = [count * rank // ranks.size for rank in range(ranks.size + 1)]
        shares = [every[start:stop] for start, stop in itertools.pairwise(bounds)]
        if count < ranks.size:  # so few that each computes all
            shares = [every] * ranks.size
        mine = rows if ranks.is_alone else rows.held(shares, ranks.rank)
        num_calls = -(-max(len(share) for share in shares) // self.microbatch)  # as many on each rank
        parts = torch.arange(len(mine), device=every.device).tensor_split(max(1, num_calls))
        own = torch.cat([compute(mine.take(part)) for part in parts], -1)
        if count < ranks.size:
            return own
        return ranks.whole(own.movedim(-1, 0).contiguous(), bounds).movedim(0, -1)


class Rows(Protocol):
    """What an iteration's updates train on: `n` rows, drawn in any order."""

    @property
    def sample_index(self) -> Int64[Tensor, " n"]:
        """The sample that a row belongs to, for minibatches of whole samples."""
        ...

    @property
    def is_live(self) -> Bool[Tensor, " n"] | None:
        """Rows whose loss has a gradient; the others count in the mean and cost nothing. None: all of them."""
        ...

    @property
    def num_forwards(self) -> int:
        """Denoiser rows of a row."""
        ...

    def __len__(self) -> int: ...

    def ordered(self, rows: Int64[Tensor, " m"]) -> "Rows":
        """These rows, in their order: those of an update. Copies no latents."""
        ...

    def held(self, shares: Sequence[Int64[Tensor, " m"]], rank: int) -> "Rows":
        """The rows `shares[rank]` in their order, with what they need of tables that are spread over ranks.

        Every rank calls it, with the same shares.
        """
        ...

    def take(self, rows: Int64[Tensor, " m"] | slice) -> Any:
        """What `loss` is given of some rows, on the device."""
        ...


@dataclass(frozen=True)
class Loss:
    """Of `n` rows: what is minimised, unreduced, and what is told of each.

    Statistics are [n] without gradient: "step" (the denoising step of each row), and those that the algorithm has of
    "ratio", "approx_kl", "clipfrac", "kl", "nonfinite", "log_prob" and "rollout_log_prob" (as the rollout recorded it),
    and "output_gradient" (norm of the gradient of the row's loss in the outputs). What has another name is the
    algorithm's own, and its mean is told under it.
    """

    values: Float[Tensor, " n"]
    statistics: dict[str, Tensor]
    gradients: Sequence[Tensor] | None = None
    """Of `scale * values.sum()` in the policy's outputs, in their order, where an operation gave them with the loss."""


@dataclass(kw_only=True)
class Algorithm(ABC):
    """Base of all algorithms; a subclass has `batch` and `loss`, and overrides what it does otherwise."""

    name: str
    needs_reference: bool = False
    """Whether the model as it was before training has to be there."""
    train_guidance: str = "both"
    """Outputs that carry gradient under guidance: "both", or the "conditional" one alone."""

    def suit(self, backbone: Backbone) -> None:  # noqa: B027 - most algorithms suit every model
        """Make ready for training this model, once; ValueError where that cannot be."""

    def schedule(self, schedule: Schedule) -> Schedule:
        """The sampler that samples are collected with, from the one that was configured."""
        return schedule

    def log_prob_kind(self, schedule: Schedule) -> Kind:
        """Which log-probability the rollout records."""
        return "gaussian"

    @property
    def preferences(self) -> Preferences | None:
        """The set that it learns from in place of rollouts; None: of its own pictures alone."""
        return None

    def draw(self, seed: int, count: int) -> list[str] | None:
        """The prompts of an iteration's `count` records of a set, drawn from `seed`; None: it has no set."""
        return None

    def collect(self, collector: Collector) -> Samples | Stills:
        """The samples of an iteration."""
        return collector()

    def steps(self, chosen: Bool[Tensor, "b t"], trainable: Bool[Tensor, " t"]) -> Bool[Tensor, "b t"]:
        """The steps to train, of those that the selector has chosen."""
        return chosen

    @property
    def shares_noise(self) -> bool:
        """Whether the samples of a prompt start from one latent."""
        return False

    @property
    def branches(self) -> bool:
        """Whether its rollouts are branched, so that each sample has calls of the denoiser of its own."""
        return False

    @property
    def needs_x0(self) -> bool:
        """Whether its loss looks at what the rollout guessed of the final latents, which whoever draws must tell."""
        return False

    @property
    def is_repeatable(self) -> bool:
        """Whether `loss` asks the host for nothing that changes while it is trained, so that CUDA graphs may repeat it.

        Numbers and branches may depend on its arguments' shapes and on `is_on_policy`; `scale` is a tensor then.
        """
        return False

    @property
    def is_known_ahead(self) -> bool:
        """Whether what multiplies a step's gradient, but for the sample's reward, is known before the rollout."""
        return True

    @abstractmethod
    def batch(self, samples: Any, context: Context) -> Rows:
        """The rows of the iteration's updates, of what `collect` gave."""

    @abstractmethod
    def loss(self, policy: Policy, rows: Any, *, is_on_policy: bool, scale: float) -> Loss:
        """The loss of what `Rows.take` gave.

        Args:
            is_on_policy: no parameter has moved since the rollout, so ratios are 1 exactly.
            scale: what the sum of the loss will be multiplied by; a tensor [] where the loss `is_repeatable` and is.
        """

    def state_dict(self) -> dict[str, Any]:
        """What the next iteration depends on, as JSON."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from a `state_dict`."""
        if state:
            raise ValueError(f"{self.name} has no state, but is given {sorted(state)}; the checkpoint is another's")

    def tensors(self) -> dict[str, Tensor]:
        """The same, of tensors."""
        return {}

    def load_tensors(self, tensors: dict[str, Tensor]) -> None:
        """Continue from `tensors`."""
        if tensors:
            raise ValueError(f"{self.name} has no tensors, but is given {sorted(tensors)}; the checkpoint is another's")
