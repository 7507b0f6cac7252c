"""The list of operations: true of the functions, the table of the folder's README, and usable under both names."""

import inspect
import os
import subprocess
import sys
from pathlib import Path

import pytest

from adascope_fast import ops, reference
from adascope_fast.kernels import operations
from adascope_fast.kernels.operations import OPERATIONS

if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("runs once, in the process without the interpreter", allow_module_level=True)

CHECKOUT = Path(__file__).parents[2]


def test_every_operation_that_has_a_door_is_listed():
    names = {operation.name for operation in OPERATIONS.values()}
    assert names == ops.explain("cpu").keys() - {"correlation_from_state"}


@pytest.mark.parametrize("key", OPERATIONS)
def test_an_operation_is_what_it_says(key: str):
    pytest.importorskip("triton")
    operation = OPERATIONS[key]
    name = operation.function.__name__
    assert key == (f"{name}_{operation.when}" if operation.when else name)
    assert operation.function.__module__ == f"adascope_fast.kernels.{operation.file}"
    assert (CHECKOUT / "kernels" / f"{operation.file}.py").exists()
    assert list(operation.signature.parameters) == list(inspect.signature(getattr(reference, name)).parameters)
    assert operation.takes_guidance == ("output_uncond" in operation.signature.parameters)
    assert operation.takes_reference == (name.startswith("transition_policy"))


def test_bytes_are_those_counted_by_hand():
    step, loss, kl = (OPERATIONS[name] for name in ("transition_step", "transition_policy_loss", "gaussian_kl"))
    assert step.bytes_moved(latent=4, output=2) == 4 + 4 + 2 + 4
    assert step.bytes_moved(latent=4, output=2, is_guided=True) == 4 + 4 + 2 + 2 + 4
    assert kl.bytes_moved(latent=4, output=2) == (2 + 2) + (2 + 2 + 2)
    forward, gradient = 4 + 4 + 2, 4 + 4 + 2 + 2
    assert loss.bytes_moved(latent=4, output=2, with_gradient=False) == forward
    assert loss.bytes_moved(latent=4, output=2) == forward + gradient
    assert loss.bytes_moved(latent=4, output=2, has_reference=True) == forward + gradient + 2 + 2
    assert loss.bytes_moved(latent=4, output=2, is_guided=True) == forward + gradient + 2 + 2 + 2
    on_policy, many = OPERATIONS["transition_policy_grad_on_policy"], OPERATIONS["correlations"]
    assert on_policy.bytes_moved(latent=4, output=2, is_guided=True) == 4 + 4 + 2 + 2 + 2 + 2
    assert many.bytes_moved(latent=4, output=2, k=5) == 5 * 4 + 4
    with pytest.raises(ValueError, match="is_guided must be False for gaussian_kl"):
        kl.bytes_moved(latent=4, output=2, is_guided=True)


def test_the_readme_shows_the_table():
    assert operations.markdown() in (CHECKOUT / "kernels" / "README.md").read_text(encoding="utf-8")


def _run(program: str, **environment: str) -> str:
    """What a program printed that was run from the checkout, without what pytest has imported."""
    command = [sys.executable, "-c", program]
    told = os.environ | {"PYTHONPATH": str(CHECKOUT), "OMP_NUM_THREADS": "1"} | environment
    done = subprocess.run(command, cwd=CHECKOUT, env=told, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_the_list_is_read_without_torch_and_printed():
    program = (
        "import sys\nfrom adascope_fast.kernels.operations import OPERATIONS\n"
        "assert not {'torch', 'triton'} & sys.modules.keys()\n"
        "import runpy\nrunpy.run_module('adascope_fast.kernels.operations', run_name='__main__')"
    )
    assert _run(program) == operations.markdown() + "\n"


BOTH_NAMES = """
import torch
from adascope_fast.kernels.operations import OPERATIONS
try:
    from kernels.operations import OPERATIONS as BARE
except ModuleNotFoundError:  # another package of that name is installed
    print("hidden")
    raise SystemExit
from kernels.library import register

for name, operation in OPERATIONS.items():
    assert operation.function is not BARE[name].function
    ours, theirs = (vars(__import__(one.function.__module__, fromlist=["*"])) for one in (operation, BARE[name]))
    assert all(ours[key] is theirs[key] for key in ours if key.endswith("_op")), name
if INTERPRETED:
    latents, coef = torch.randn(3, 2, 12), torch.rand(2, 3) + 0.5
    results = [one["transition_step"].function(*latents, coef) for one in (BARE, OPERATIONS)]
    assert all(torch.equal(a, b) and a.isfinite().all() for a, b in zip(*results))
try:
    register("transition_step(Tensor sample) -> Tensor", print, print)
except RuntimeError as error:
    print("refused" if "multiple times" in str(error) else error)
"""


@pytest.mark.parametrize("interpreted", ["0", "1"])
def test_both_names_serve_in_one_process(interpreted: str):
    """And an operator of another schema, from another version of these files, is still refused."""
    pytest.importorskip("triton")
    program = f"INTERPRETED = {interpreted}\n{BOTH_NAMES}"
    printed = _run(program, TRITON_INTERPRET=interpreted).strip()
    if printed == "hidden":
        pytest.skip("a package named `kernels` is installed, and has the bare name")
    assert printed == "refused"
