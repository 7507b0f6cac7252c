"""A denoiser, decoder or update that gives NaN or inf: the run stops or leaves samples out, and exports nothing bad."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
from safetensors.numpy import load_file, save_file

from bench.faults.rewards import copied_model, judge
from bench.faults.runs import Row, Setting, reset, short, train


@dataclass(frozen=True)
class Case:
    """A name, overrides, and which part of a copied model gets which value in its first weights."""

    name: str
    overrides: tuple[str, ...] = ()
    part: str = ""
    value: float = 0.0
    share: float = 1.0


LARGEST_WEIGHT = 3e38  # or that of the type
LARGEST = ("train.learning_rate=10.0", "model.lora_alpha=65536", "train.max_grad_norm=1e12")
OFTEN = ("train.iterations=5",)
CASES = [
    Case("a NaN in the denoiser's weights", part="unet", value=float("nan"), share=0.0),
    Case("NaN in all the denoiser's weights", part="unet", value=float("nan")),
    Case("inf in the denoiser's weights", part="unet", value=float("inf"), share=0.0),
    Case("a NaN in the decoder's weights", part="vae", value=float("nan"), share=0.0),
    Case("a NaN in the text encoder's weights", part="text_encoder", value=float("nan"), share=0.0),
    Case("huge weights in the denoiser", part="unet", value=LARGEST_WEIGHT),
    Case("learning rate 1e30", ("train.learning_rate=1e30",)),
    Case("updates that overflow, skip", (*LARGEST, 'train.on_nonfinite="skip"', *OFTEN)),
    Case("updates that overflow, stop", (*LARGEST, 'train.on_nonfinite="stop"', *OFTEN)),
    Case("lora_alpha 1e22", ("model.lora_alpha=10000000000000000000000",)),
    Case("guidance 1e30", ("sampler.guidance_scale=1e30",)),
    Case("float16 overflow", ("model.dtype=float16", "model.lora_alpha=65536", "train.learning_rate=1.0", *OFTEN)),
]
CAUSES = ("finite", "NaN", "nan", "inf", "overflow", "lora_alpha", "learning_rate", "guidance", "dtype", "precision")


def run_case(setting: Setting, case: Case) -> list[Row]:
    """Train; what counts as right is a refusal by name, samples dropped and counted, or a result that is finite."""
    folder = setting.folder("not_finite", case.name.replace(" ", "_").replace("'", "").replace(",", ""))
    overrides = list(case.overrides)
    if case.part:
        overrides.append(f"model.name={_damaged(folder, case)}")
    outcome = setting.program.run(train(*overrides), folder)
    label, detail = judge(setting, folder / "run", outcome, *CAUSES, case.part or "model")
    if "unknown key" in outcome.err:  # a fault that this harness did not manage to put in
        return [Row("not finite", case.name, "not run", short(outcome))]
    if label in ("refused", "dropped"):
        reset(folder)
        return [Row("not finite", case.name, label)]
    return [Row("not finite", case.name, label, f"{case.name}: {detail or short(outcome)}")]


def _damaged(folder: Path, case: Case) -> Path:
    model = copied_model(folder)
    (path,) = (model / case.part).glob("*.safetensors")
    tensors = load_file(path)
    floats = [name for name, value in tensors.items() if value.dtype.kind == "f" and value.ndim > 1]
    chosen = floats if case.share else floats[:1]
    for name in chosen:
        tensors[name] = tensors[name].copy()
        value = (
            min(case.value, float(np.finfo(tensors[name].dtype).max)) if case.value == LARGEST_WEIGHT else case.value
        )
        tensors[name].reshape(-1)[: None if case.share else 1] = value
    save_file(tensors, path, metadata={"format": "pt"})
    return model
