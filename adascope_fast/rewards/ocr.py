"""Whether the picture shows the text that its prompt quotes, by optical character recognition (flow_grpo's OCR reward).

1 - min(d, n) / n, with n the length of the first quoted text and d the edit distance from all that was read, in lower
case and without spaces; d is 0 where the text is contained. Differs from flow_grpo: RapidOCR reads (PP-OCR models in
ONNX, which its package brings) in place of PaddleOCR, curly quotes count too, and what fails to be read is an error.
It runs on the CPU, a picture at a time.
"""

import re
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from adascope_fast.rewards.reward import eight_bits
from adascope_fast.rewards.settings import OCR_NOT_INSTALLED

QUOTED = re.compile(r'"([^"]+)"|\u201c([^\u201d]+)\u201d')


class Ocr:
    """Reward in [0, 1] of the text in the picture; prompts without a quoted text are refused."""

    name = "ocr"

    def __init__(self) -> None:
        try:
            import onnxruntime  # noqa: F401 - RapidOCR says that it is missing only once it reads
            from rapidocr import RapidOCR
        except ImportError:
            raise ValueError(OCR_NOT_INSTALLED) from None
        threads = {"EngineConfig.onnxruntime.intra_op_num_threads": torch.get_num_threads()}
        self._read: Any = RapidOCR(params={"Global.log_level": "critical", **threads})

    def __call__(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        """Scores [b] float32 of pictures [b, 3, h, w] in [0, 1]."""
        pixels = eight_bits(images)
        scores = [likeness(self._text(image), text_of(prompt)) for image, prompt in zip(pixels, prompts, strict=True)]
        return torch.tensor(scores, dtype=torch.float32, device=images.device)

    def check_prompts(self, prompts: Sequence[str], where: str) -> None:
        """ValueError where one of them quotes no text."""
        without = [prompt for prompt in prompts if not text_of(prompt)]
        if without:
            raise ValueError(
                f'reward ocr reads the text that a prompt quotes, as in a sign that says "OPEN", got {len(without)} in '
                f"{where} without, first {without[0]!r:.80}; quote it, or choose another reward"
            )

    def _text(self, image: Any) -> str:
        found = self._read(image[..., ::-1], use_cls=False)  # it takes blue first; pictures are upright
        return "".join(found.txts or ())


def text_of(prompt: str) -> str:
    """The first text in double quotes, in lower case and without spaces; "" where there is none."""
    found = QUOTED.search(prompt)
    return _plain(found[1] or found[2]) if found else ""


def likeness(read: str, wanted: str) -> float:
    """1 - min(edit distance, n) / n for n characters that are wanted; 1 where they are contained."""
    read, wanted = _plain(read), _plain(wanted)
    distance = 0 if wanted in read else min(edit_distance(read, wanted), len(wanted))
    return 1 - distance / max(1, len(wanted))


def edit_distance(one: str, other: str) -> int:
    """The least number of characters to insert, delete or replace (Levenshtein)."""
    row = list(range(len(other) + 1))
    for i, a in enumerate(one, 1):
        before, row[0] = row[0], i
        for j, b in enumerate(other, 1):
            before, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, before + (a != b))
    return row[-1]


def _plain(text: str) -> str:
    return "".join(text.split()).lower()
