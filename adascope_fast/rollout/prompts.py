"""Prompts as the denoiser knows them: each distinct one encoded once."""

from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from jaxtyping import Int64
from torch import Tensor

from adascope_fast.backbone import Backbone, Condition


@dataclass(frozen=True)
class EncodedPrompts:
    """Distinct prompts, encoded once: `condition` has a row for each, `negative` one row for the empty prompt."""

    prompts: list[str]
    condition: Condition
    negative: Condition

    @classmethod
    def of(cls, backbone: Backbone, prompts: Sequence[str]) -> "EncodedPrompts":
        """Encode each distinct prompt once, in order of first appearance."""
        distinct = list(dict.fromkeys(prompts))
        return cls(distinct, backbone.encode(distinct), backbone.encode([""]))

    def index(self, prompts: Sequence[str], device: torch.device) -> Int64[Tensor, " b"]:
        """The row of each prompt."""
        row = {prompt: number for number, prompt in enumerate(self.prompts)}
        return torch.tensor([row[prompt] for prompt in prompts], device=device)


@dataclass
class PromptCache:
    """Encodes prompts, each distinct one once in the run, as long as `max_bytes` hold them."""

    backbone: Backbone
    max_bytes: int = 2**30
    negative_prompt: str = ""
    """What guidance leads away from."""
    _rows: OrderedDict[str, Condition] = field(default_factory=OrderedDict, init=False, repr=False)
    _negative: Condition | None = field(default=None, init=False, repr=False)

    def __call__(self, prompts: Sequence[str]) -> EncodedPrompts:
        """The distinct prompts in order of first appearance; the text encoder runs for the unknown ones alone."""
        distinct = list(dict.fromkeys(prompts))
        for prompt in distinct:  # one at a time: what is cached cannot depend on its neighbours, nor on a resume
            if prompt not in self._rows:
                self._rows[prompt] = self.backbone.encode([prompt])
        if self._negative is None:
            self._negative = self.backbone.encode([self.negative_prompt])
        rows = [self._rows[prompt] for prompt in distinct]
        condition = {name: torch.cat([row[name] for row in rows]) for name in self._negative}
        self._forget(distinct)
        return EncodedPrompts(distinct, condition, self._negative)

    def _forget(self, used: list[str]) -> None:
        """Drop the prompts used least recently beyond `max_bytes`."""
        for prompt in used:
            self._rows.move_to_end(prompt)
        size_of = sum(value.numel() * value.element_size() for value in self._rows[used[-1]].values())
        while len(self._rows) * size_of > self.max_bytes:
            self._rows.popitem(last=False)
