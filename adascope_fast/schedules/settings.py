"""The section `[sampler]`: how rollouts walk from noise to an image. Nothing here imports torch."""

from typing import Annotated, Any, Literal, Self

from pydantic import Field, model_validator

from adascope_fast.settings import Guidance, Section, Share, Steps

Kind = Literal["auto", "ddim", "ddpm", "flow_sde", "dance_sde", "flow_cps", "flow_ode", "dpm_solver"]
NOISE = {"ddim": ("eta",), "ddpm": (), "flow_sde": ("noise_level",), "dance_sde": ("eta",), "flow_cps": ("eta",)}
NOISE |= {"flow_ode": (), "dpm_solver": (), "auto": ("eta", "noise_level")}


class Sampler(Section):
    """How rollouts walk from noise to an image."""

    kind: Kind = "auto"
    """`auto`: `ddim` for diffusion models (also `ddpm`), `flow_sde` for flow models (also `dance_sde`, `flow_cps`, and
    `flow_ode` without noise). `dpm_solver`: DPM-Solver++(2M), second order and without noise, for either. Without noise
    there are no log-probabilities, so only algorithms that need none can train."""
    num_steps: Steps = 20
    """Denoising steps of a rollout, T."""
    guidance_scale: Guidance = 1.0
    """Classifier-free guidance in rollout and training; 1 means none, at half the cost."""
    train_guidance: Literal["both", "conditional"] | None = None
    """Outputs that carry gradient under guidance: both (TRL, ddpo-pytorch), or only the conditional one (flow_grpo);
    absent: the algorithm's own."""
    eta: Annotated[float, Field(ge=0, le=1)] | None = None
    """Noise of ddim (absent: 1), dance_sde (absent: 0.3) or flow_cps (absent: 0.7); 0 is deterministic."""
    noise_level: Annotated[float, Field(gt=0, le=10)] | None = None
    """Noise of flow_sde; absent: 0.7 for it."""
    shift: Annotated[float, Field(gt=0, le=100)] | None = None
    """Of flow samplers: noise levels fall evenly from 1 to 0 and are shifted once, s t / (1 + (s - 1) t), as in
    DanceGRPO and MixGRPO (3); absent: the model's own."""
    tail_share: Share = 1.0
    """Below 1: the steps after the last trained one become this share of them, of a second-order ODE solver."""

    @property
    def is_deterministic(self) -> bool:
        """Whether the section alone says that no step has noise."""
        return self.kind in ("flow_ode", "dpm_solver") or self.eta == 0

    @property
    def table(self) -> dict[str, Any]:
        """What a model's `schedule` takes besides the number of steps."""
        return {"kind": self.kind, "eta": self.eta, "noise_level": self.noise_level, "shift": self.shift}

    @model_validator(mode="after")
    def _noise_is_the_kinds_own(self) -> Self:
        for name in ("eta", "noise_level"):
            if getattr(self, name) is not None and name not in NOISE[self.kind]:
                takes = ", ".join(f"sampler.{own}" for own in NOISE[self.kind]) or "no noise"
                raise ValueError(
                    f'sampler.kind = "{self.kind}" takes {takes}, got sampler.{name} = {getattr(self, name)}; remove it'
                )
        if self.kind == "dpm_solver" and self.tail_share < 1:
            raise ValueError(
                "a tail of sampler.tail_share is the steps of dpm_solver after the last trained one, got "
                f'sampler.tail_share = {self.tail_share} with sampler.kind = "dpm_solver", which takes them all; '
                f"lower sampler.num_steps, or set sampler.tail_share = 1.0"
            )
        if self.shift is not None and self.kind in ("ddim", "ddpm"):
            raise ValueError(
                f'sampler.shift is of flow samplers, got {self.shift} with sampler.kind = "{self.kind}"; remove it'
            )
        if self.train_guidance is not None and self.guidance_scale == 1:
            raise ValueError(
                f'sampler.train_guidance = "{self.train_guidance}" says which outputs carry gradient under guidance, '
                "got sampler.guidance_scale = 1, which is none; remove it, or raise the scale"
            )
        return self
