"""Every operation of this folder: function, file, launches, the bytes that it moves, and what it returns.

    from adascope_fast.kernels.operations import OPERATIONS

    step = OPERATIONS["transition_step"]
    step.bytes_moved(latent=4, output=2, is_guided=True)  # 16 an element: float32 latents, bfloat16 model outputs
    step.function(sample, output, noise, coef)            # on CUDA tensors; imports torch and Triton, here alone

The one declaration: `bench/kernels` takes its traffic from it, and README.md shows the table that
`python -m adascope_fast.kernels.operations` prints. From a checkout `kernels.operations` is the same, unless another
package named `kernels` is installed.
"""

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from typing import Any


@dataclass(frozen=True, kw_only=True)
class Pass:
    """One way through an operation: its launches, and how often the elements of a row are read and written.

    Latents and model outputs may differ in type, so they are counted apart. `stacks_read`: of k latents a row each.
    """

    launches: int
    latents_read: int = 0
    outputs_read: int = 0
    stacks_read: int = 0
    latents_written: int = 0
    outputs_written: int = 0


@dataclass(frozen=True, kw_only=True)
class Operation:
    """What one public function does, or one way of calling it.

    Args:
        when: of the ways of calling it, this one; its key in OPERATIONS is then `name_when`.
        file: in this folder, without its ending.
        returns: in words; [n] is a number for each row.
        gradient: None where the operation carries none.
        takes_guidance, takes_reference: on request each pass reads one more model output; with guidance, a pass that
            writes the gradient of one writes that of the other too.
    """

    name: str
    when: str = ""
    file: str
    returns: str
    forward: Pass
    gradient: Pass | None = None
    takes_guidance: bool = False
    takes_reference: bool = False

    @property
    def key(self) -> str:
        """In OPERATIONS."""
        return f"{self.name}_{self.when}" if self.when else self.name

    @property
    def function(self) -> Callable[..., Any]:
        """The kernel's public function, with the signature of its twin in `reference`."""
        return getattr(import_module(f".{self.file}", __package__), self.name)

    @property
    def signature(self) -> inspect.Signature:
        """Of `function`."""
        return inspect.signature(self.function)

    def passes(self, *, with_gradient: bool = True) -> list[Pass]:
        """The forward pass, then the gradient's, if there is one and it is asked for."""
        return [self.forward, *([self.gradient] if self.gradient is not None and with_gradient else [])]

    def bytes_moved(
        self,
        *,
        latent: int,
        output: int,
        is_guided: bool = False,
        has_reference: bool = False,
        with_gradient: bool = True,
        k: int = 1,
    ) -> int:
        """Bytes read and written for one element of a row; terms of a few bytes a row are left out.

        Args:
            latent, output: bytes of an element of latents, and of model outputs and their gradients.
            is_guided, has_reference: whether `output_uncond` and `ref_output` are given.
            k: latents of a row of a stack.
        """
        for is_asked, is_taken, what in (
            (is_guided, self.takes_guidance, "is_guided"),
            (has_reference, self.takes_reference, "has_reference"),
        ):
            if is_asked and not is_taken:
                raise ValueError(f"{what} must be False for {self.name}, which takes no such output")
        total = 0
        for one in self.passes(with_gradient=with_gradient):
            more_written = is_guided and one.outputs_written > 0
            outputs = one.outputs_read + is_guided + has_reference + one.outputs_written + more_written
            total += latent * (one.latents_read + k * one.stacks_read + one.latents_written) + output * outputs
        return total


_LOG_PROB: dict[str, Any] = {
    "file": "transition",
    "returns": "log_prob [n]",
    "forward": Pass(launches=2, latents_read=2, outputs_read=1),
    "gradient": Pass(launches=1, latents_read=2, outputs_read=1, outputs_written=1),
}
_POLICY: dict[str, Any] = {"takes_guidance": True, "takes_reference": True}
_CLIPPED: dict[str, Any] = {
    "file": "policy_loss",
    "returns": "loss [n], ratio [n]",
    "forward": Pass(launches=1),
    "gradient": Pass(launches=1),  # PyTorch's product
}
_ALL = [
    Operation(name="transition_log_prob", **_LOG_PROB),
    Operation(name="guided_transition_log_prob", takes_guidance=True, **_LOG_PROB),
    Operation(
        name="transition_log_prob_grad",
        file="transition",
        returns="the gradient of each output",
        forward=Pass(launches=1, latents_read=2, outputs_read=1, outputs_written=1),
        takes_guidance=True,
    ),
    Operation(
        name="transition_step",
        file="step",
        returns="prev_sample, log_prob [n]",
        forward=Pass(launches=2, latents_read=2, outputs_read=1, latents_written=1),
        takes_guidance=True,
    ),
    Operation(
        name="transition_step_with_x0",
        file="step",
        returns="prev_sample, log_prob [n], x0, x0_correlation [n], sample_correlation [n]",
        forward=Pass(launches=2, latents_read=3, outputs_read=1, latents_written=2),
        takes_guidance=True,
    ),
    Operation(
        name="gaussian_kl",
        file="gaussian_kl",
        returns="kl [n]",
        forward=Pass(launches=2, outputs_read=2),
        gradient=Pass(launches=1, outputs_read=2, outputs_written=1),
    ),
    Operation(name="clipped_policy_loss", **_CLIPPED),
    Operation(name="dpok_policy_loss", **_CLIPPED),
    Operation(
        name="transition_policy_loss",
        file="training_step",
        returns="loss [n], statistics [n] each",
        forward=Pass(launches=2, latents_read=2, outputs_read=1),
        gradient=Pass(launches=1, latents_read=2, outputs_read=1, outputs_written=1),
        **_POLICY,
    ),
    Operation(
        name="transition_policy_grad",
        file="training_gradient",
        returns="loss [n], statistics [n] each, the gradient of each output",
        forward=Pass(launches=1, latents_read=2, outputs_read=1),
        gradient=Pass(launches=1, latents_read=2, outputs_read=1, outputs_written=1),
        **_POLICY,
    ),
    Operation(
        name="transition_policy_grad",
        when="on_policy",
        file="training_gradient",
        returns="the same",
        forward=Pass(launches=2, latents_read=2, outputs_read=1, outputs_written=1),
        **_POLICY,
    ),
    Operation(
        name="correlation",
        file="correlation",
        returns="correlation [n]",
        forward=Pass(launches=2, latents_read=2),
    ),
    Operation(
        name="correlations",
        file="correlation",
        returns="correlation [n, k]",
        forward=Pass(launches=2, latents_read=1, stacks_read=1),
    ),
    Operation(
        name="correlation_update",
        file="correlation",
        returns="state [n, 6]",
        forward=Pass(launches=2, latents_read=2),
    ),
]
OPERATIONS = {operation.key: operation for operation in _ALL}


def markdown() -> str:
    """The table of README.md, which says what its letters are."""
    columns = (
        "operation | file | launches | reads | writes | gradient reads | gradient writes | float32, bf16 | bf16, bf16"
    )
    lines = [f"| {columns} | returns |", "|---" * 10 + "|"]
    for one in OPERATIONS.values():
        launches = " + ".join(str(way.launches) for way in one.passes())
        sums = [*_sums(one, one.forward), *(["-", "-"] if one.gradient is None else _sums(one, one.gradient))]
        moved = [one.bytes_moved(latent=latent, output=2) for latent in (4, 2)]
        when = f", {one.when.replace('_', ' ')}" if one.when else ""
        lines.append(
            f"| `{one.name}`{when} | `{one.file}.py` | {launches} | {' | '.join(sums)} | {moved[0]} | {moved[1]} | "
            f"{one.returns} |"
        )
    return "\n".join(lines)


def _sums(operation: Operation, way: Pass) -> tuple[str, str]:
    """What a pass reads and writes, with what guidance adds in brackets and what a reference adds in braces."""
    read = [_times(way.stacks_read, "k s"), _times(way.latents_read, "s"), _times(way.outputs_read, "o")]
    written = [_times(way.latents_written, "s"), _times(way.outputs_written, "o")]
    reads, writes = (" + ".join(filter(None, terms)) or "-" for terms in (read, written))
    more_read = (" [+ o]" if operation.takes_guidance else "") + (" {+ o}" if operation.takes_reference else "")
    more_written = " [+ o]" if operation.takes_guidance and way.outputs_written else ""
    return reads + more_read, writes + more_written


def _times(count: int, unit: str) -> str:
    return "" if count == 0 else unit if count == 1 else f"{count} {unit}"


if __name__ == "__main__":
    print(markdown())
