"""What goes over the wire between a training and a rollout server, version 1: safetensors files in both directions.

`b` samples, `t` steps. docs/rollout_server.md has the protocol for those who write a server, or a client.
"""

import hashlib
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from typing import Any, Self, get_args

import torch
from jaxtyping import Float, Float32
from safetensors import SafetensorError
from safetensors.torch import load
from torch import Tensor

from adascope_fast.reference import Kind
from adascope_fast.schedules import Schedule
from adascope_fast.serving.wire import read_header, refuse_version, write_file
from adascope_fast.settings import one_line

VERSION = 1
KINDS: tuple[str, ...] = get_args(Kind)
MOST_SAMPLES = 4096  # of a request
MOST_STEPS = 10_000
MOST_VALUES = 2**31  # of all latents and guesses of an answer
MOST_OF_A_PROMPT = 10_000  # characters
LARGEST_SEED = 2**63 - 1
SPARE = 2**20  # bytes of an answer besides its tensors

TABLES = {"timesteps": 0, "coef": 3, "x0_coef": 2}
"""The tables of a request, with their columns."""
NUMBERS = ("x0_correlation", "sample_correlation")


@dataclass(frozen=True)
class Served:
    """What a server says of itself."""

    name: str
    """Of its model."""
    model: str
    """SHA-256 of what its model is made of before it is trained: another one is another model."""
    package: str
    """Of what it runs, with its version."""
    latent_shape: list[int]
    weights: str
    """Digest of the trained weights that it holds; "" before any were sent."""
    noise: str
    """`seeds`: as `noise_of` draws it; `own`: as the server likes."""
    has_x0: bool
    """Whether answers can have the guesses of the final latents."""
    has_correlations: bool
    """Whether they have the correlations of guesses and of latents from one step to the next."""
    shares_start: bool
    """Whether samples can start from the latent of another's seed."""
    kinds: list[str]
    """The log-probabilities that it knows."""
    most_bytes: int
    """The longest body that is taken."""
    version: int = VERSION

    def write(self) -> dict[str, Any]:
        """As plain values."""
        return asdict(self)

    @classmethod
    def read(cls, values: Mapping[str, Any]) -> Self:
        """Of plain values; ValueError where they are none of these, or of another version."""
        refuse_version(values, VERSION)
        found: dict[str, Any] = {field.name: values.get(field.name) for field in fields(cls)}
        is_right = (
            all(isinstance(found[name], str) for name in ("name", "model", "package", "weights"))
            and all(isinstance(found[name], bool) for name in ("has_x0", "has_correlations", "shares_start"))
            and found["noise"] in ("seeds", "own")
            and _are(found["latent_shape"], int)
            and _are(found["kinds"], str)
            and type(found["most_bytes"]) is int
        )
        if not is_right:
            raise ValueError("its description has not the fields that it must have")
        found["name"], found["package"] = (one_line(found[name])[:200] for name in ("name", "package"))
        return cls(**found)


@dataclass(frozen=True)
class Request:
    """Samples to draw, each with its prompt and its seed."""

    weights: str
    """Digest of the trained weights that they must be drawn with."""
    prompts: list[str]
    seeds: list[int]
    start_seeds: list[int]
    """Of each, the seed whose noise has the latent that it starts from: its own, unless samples start alike."""
    guidance_scale: float
    kind: Kind
    """Of the log-probability."""
    asks_x0: bool
    """Whether the guesses of the final latents are wanted, which are half of an answer."""
    schedule: Schedule

    def write(self) -> bytes:
        """The body of a request."""
        about = {
            "version": VERSION,
            "weights": self.weights,
            "prompts": self.prompts,
            "seeds": self.seeds,
            "start_seeds": self.start_seeds,
            "guidance_scale": self.guidance_scale,
            "kind": self.kind,
            "x0": self.asks_x0,
            "sampler": self.schedule.kind,
        }
        tables = {name: getattr(self.schedule, name).detach().float().cpu().contiguous() for name in TABLES}
        return write_file(tables, about)

    @classmethod
    def read(cls, body: bytes) -> Self:
        """What `write` wrote; ValueError where it is anything else, or more than may be asked for at once."""
        about, header = read_header(body, VERSION)
        told: list[Any] = [about.get(name) for name in ("prompts", "seeds", "start_seeds")]
        prompts, seeds, starts = told
        if not _are(prompts, str) or not 1 <= len(prompts) <= MOST_SAMPLES:
            raise ValueError(f'"prompts" must be a list of 1 to {MOST_SAMPLES} texts; send a text a sample')
        if max(map(len, prompts)) > MOST_OF_A_PROMPT:
            raise ValueError(f"a prompt has at most {MOST_OF_A_PROMPT} characters, got more; shorten it")
        for name, values in (("seeds", seeds), ("start_seeds", starts)):
            if not _are(values, int) or len(values) != len(prompts) or not _lie_in(values, 0, LARGEST_SEED):
                raise ValueError(f'"{name}" must be {len(prompts)} whole numbers below 2^63; send one a sample')
        told = [about.get(name) for name in ("guidance_scale", "weights", "kind", "sampler")]
        scale, weights, kind, sampler = told
        if type(scale) not in (int, float) or not 0 <= scale <= 1000:
            raise ValueError(f'"guidance_scale" must be a number from 0 to 1000, got {scale!s:.20}; send one')
        if not isinstance(weights, str) or not isinstance(sampler, str) or kind not in KINDS:
            raise ValueError(f'"weights" and "sampler" must be texts, and "kind" one of {", ".join(KINDS)}; send these')
        if type(asks_x0 := about.get("x0")) is not bool:
            raise ValueError('"x0" must be true or false; say whether the guesses are wanted')
        tables = _tensors(body, header, dict.fromkeys(TABLES))
        num_steps = len(tables["timesteps"]) if tables["timesteps"].ndim else 0
        for name, columns in TABLES.items():
            wanted = [num_steps, columns] if columns else [num_steps]
            if list(tables[name].shape) != wanted or not 1 <= num_steps <= MOST_STEPS:
                raise ValueError(f"{name} must have a row a step, got shape {list(tables[name].shape)}; send {wanted}")
            if not bool(tables[name].isfinite().all()):
                raise ValueError(f"{name} must be finite, got others; send the table of a sampler")
        if bool((tables["coef"][:, 2] < 0).any()):
            raise ValueError("the std of a step is 0 or more, got less; send the table of a sampler")
        unknown = torch.full_like(tables["timesteps"], torch.nan)
        timesteps, coef, x0_coef = (tables[name] for name in TABLES)
        schedule = Schedule(timesteps, coef, x0_coef, unknown, one_line(sampler)[:40])
        return cls(weights, prompts, seeds, starts, float(scale), kind, asks_x0, schedule)

    def refuse_more(self, latent_shape: Sequence[int]) -> None:
        """ValueError where its answer would be too long."""
        count = len(self.prompts) * (2 * self.schedule.num_steps + 1) * math.prod(latent_shape)
        if count > MOST_VALUES:
            raise ValueError(f"an answer has at most {MOST_VALUES} values, and this one has {count}; ask for fewer")


@dataclass(frozen=True)
class Answer:
    """What was drawn: the columns of `Trajectory`, all float32."""

    latents: Float32[Tensor, "b t+1 *latent"]
    log_prob: Float32[Tensor, "b t"]
    x0: Float32[Tensor, "b t *latent"] | None = None
    x0_correlation: Float32[Tensor, "b t"] | None = None
    sample_correlation: Float32[Tensor, "b t"] | None = None

    def write(self, *, weights: str, model: str) -> bytes:
        """The body of an answer, drawn with these weights of this model."""
        tensors = {name: value.float().cpu().contiguous() for name, value in vars(self).items() if value is not None}
        return write_file(tensors, {"version": VERSION, "weights": weights, "model": model})

    @classmethod
    def read(cls, body: bytes, served: Served, request: Request) -> tuple[Self, str, str]:
        """(answer, digest of its weights, digest of its model); ValueError where it is none to such a request."""
        num_samples, num_steps = len(request.prompts), request.schedule.num_steps
        about, header = read_header(body, VERSION, "an answer")
        latent = list(served.latent_shape)
        shapes: dict[str, list[int] | None] = {
            "latents": [num_samples, num_steps + 1, *latent],
            "log_prob": [num_samples, num_steps],
        }
        shapes |= {"x0": [num_samples, num_steps, *latent]} if served.has_x0 and request.asks_x0 else {}
        shapes |= {name: [num_samples, num_steps] for name in NUMBERS} if served.has_correlations else {}
        weights, model = about.get("weights"), about.get("model")
        if not isinstance(weights, str) or not isinstance(model, str):
            raise ValueError("it does not say which weights of which model it was drawn with")
        return cls(**_tensors(body, header, shapes)), weights, model

    @staticmethod
    def num_bytes(served: Served, request: Request) -> int:
        """Of the longest answer that there may be."""
        num_states = len(request.prompts) * (request.schedule.num_steps + 1)
        return 4 * num_states * (2 * math.prod(served.latent_shape) + 3) + SPARE


def write_weights(tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> tuple[bytes, str]:
    """The body that hands over trained weights, and their digest."""
    found = digest(tensors)
    return write_file(tensors, {"version": VERSION, "weights": found}, **metadata), found


def read_weights(body: bytes) -> tuple[dict[str, Tensor], str]:
    """(tensors, their digest); ValueError where they are not what their digest says, or not finite."""
    about, header = read_header(body, VERSION)
    tensors = _tensors(body, header, dict.fromkeys(header))
    if not tensors:
        raise ValueError("trained weights are one tensor or more, got none; send them")
    found = digest(tensors)
    if found != about.get("weights"):
        raise ValueError(
            f"the digest of the weights is {found}, got {about.get('weights')!s:.70}; send the SHA-256 of their names, "
            f"shapes and bytes"
        )
    for name, value in tensors.items():
        if not bool(value.isfinite().all()):
            raise ValueError(f"trained weights are finite, and {one_line(name)[:100]} is not; send others")
    return tensors, found


def digest(tensors: Mapping[str, Tensor]) -> str:
    """SHA-256 of float32 tensors: for each, by name, its name, a line's end, its shape, a line's end, its bytes.

    A shape is its sides with commas between them, as in 16,320; the bytes are little-endian.
    """
    total = hashlib.sha256()
    for name in sorted(tensors):
        value = tensors[name]
        total.update(f"{name}\n{','.join(map(str, value.shape))}\n".encode())
        total.update(value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    return total.hexdigest()


def noise_of(seed: int, shape: Sequence[int]) -> Float[Tensor, "t+1 *latent"]:
    """The noise of one sample, on the CPU: the latent that it starts from, then that of all steps, of one generator."""
    generator, noise = torch.Generator().manual_seed(seed), torch.empty(tuple(shape))
    for part in (noise[0], noise[1:]):
        part.copy_(torch.randn(part.shape, generator=generator))
    return noise


def _tensors(
    body: bytes, header: Mapping[str, Any], shapes: Mapping[str, list[int] | None]
) -> dict[str, Float32[Tensor, "..."]]:
    """The tensors of a file; ValueError unless they are these, float32, and of the given shapes (None: any)."""
    if header.keys() != shapes.keys():
        raise ValueError(f"the tensors must be {', '.join(shapes)}, got {one_line(', '.join(header))[:200] or 'none'}")
    for name, wanted in shapes.items():
        entry = header[name] if isinstance(header[name], dict) else {}
        if entry.get("dtype") != "F32" or (wanted is not None and entry.get("shape") != wanted):
            raise ValueError(
                f"{one_line(name)[:100]} must be float32{'' if wanted is None else f' of shape {wanted}'}, got "
                f"{str(entry.get('dtype'))[:20]} of {str(entry.get('shape'))[:100]}"
            )
    try:
        return load(body)
    except SafetensorError as error:
        raise ValueError(f"it is no safetensors file ({one_line(str(error))[:200]})") from None


def _are(values: Any, kind: type) -> bool:
    return isinstance(values, list) and all(type(value) is kind for value in values)


def _lie_in(values: Sequence[int], low: int, high: int) -> bool:
    return all(low <= value <= high for value in values)
