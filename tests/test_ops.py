"""The door of each operation: who serves it, what it says when the kernels cannot, and no silent fallback."""

import inspect
import subprocess
import sys
import warnings

import pytest
import torch

from adascope_fast import ops, reference

SHARED = (
    "transition_log_prob",
    "guided_transition_log_prob",
    "transition_log_prob_grad",
    "transition_step",
    "transition_step_with_x0",
    "clipped_policy_loss",
    "dpok_policy_loss",
    "transition_policy_loss",
    "transition_policy_grad",
    "gaussian_kl",
    "correlation",
    "correlations",
    "correlation_update",
    "correlation_from_state",
)


@pytest.fixture(autouse=True)
def plain_process(monkeypatch):
    monkeypatch.delenv("ADASCOPE_FAST_KERNELS", raising=False)
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setattr(ops, "_has_triton", True)
    monkeypatch.setattr(ops, "_fallbacks", {})
    monkeypatch.setattr(ops, "_kernels", {})
    with ops.strict(False):
        yield


def _kl_arguments(device="cpu", dtype=torch.float32):
    return (
        torch.ones(2, 3, device=device, dtype=dtype),
        torch.zeros(2, 3, device=device, dtype=dtype),
        torch.ones(2, 3, device=device),
    )


def _install_kernel(monkeypatch):
    calls = []
    monkeypatch.setitem(ops._kernels, "gaussian_kl", lambda *arguments: calls.append(arguments) or "from the kernel")
    return calls


@pytest.mark.parametrize("name", SHARED)
def test_every_operation_has_the_signature_of_its_reference(name):
    assert inspect.signature(getattr(ops, name)) == inspect.signature(getattr(reference, name))


def test_cpu_tensors_go_to_the_reference_without_a_warning():
    with ops.strict(), warnings.catch_warnings():
        warnings.simplefilter("error")
        assert ops.gaussian_kl(*_kl_arguments()).tolist() == [0.5, 0.5]
    assert ops.explain("cpu")["gaussian_kl"].startswith("reference: ")
    assert not any("fell back" in reason for reason in ops.explain("cpu").values())


def test_every_operation_is_explained():
    assert set(SHARED) == set(ops.explain("cuda"))
    assert ops.explain("cuda")["transition_step"] == "triton: cuda tensors, ADASCOPE_FAST_KERNELS=auto"


def test_interpreted_kernels_serve_cpu_tensors_when_asked(monkeypatch):
    calls = _install_kernel(monkeypatch)
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert ops.gaussian_kl(*_kl_arguments()).tolist() == [0.5, 0.5]
    assert not calls
    monkeypatch.setenv("ADASCOPE_FAST_KERNELS", "triton")
    assert ops.gaussian_kl(*_kl_arguments()) == "from the kernel"
    assert len(calls) == 1


def test_triton_on_the_cpu_is_refused_with_the_way_out(monkeypatch):
    monkeypatch.setenv("ADASCOPE_FAST_KERNELS", "triton")
    assert ops.explain("cpu")["gaussian_kl"].startswith("refused: the kernels need a GPU")
    with pytest.raises(RuntimeError, match=r"gaussian_kl: the kernels need a GPU.*ADASCOPE_FAST_KERNELS=reference"):
        ops.gaussian_kl(*_kl_arguments())


def test_reference_is_used_where_asked_for(monkeypatch):
    monkeypatch.setenv("ADASCOPE_FAST_KERNELS", "reference")
    with ops.strict():
        assert ops.gaussian_kl(*_kl_arguments("meta")).shape == (2,)
    assert ops.explain("cuda")["gaussian_kl"] == "reference: ADASCOPE_FAST_KERNELS=reference"


def test_unknown_choice_names_the_choices(monkeypatch):
    monkeypatch.setenv("ADASCOPE_FAST_KERNELS", "cuda")
    with pytest.raises(ValueError, match="auto, triton, reference, not 'cuda'"):
        ops.gaussian_kl(*_kl_arguments())
    with pytest.raises(ValueError, match="auto, triton, reference"):
        ops.explain()


def test_a_device_without_kernels_falls_back_with_one_warning_and_is_remembered():
    with pytest.warns(RuntimeWarning, match="gaussian_kl falls back to plain PyTorch: no kernels for meta tensors"):
        assert ops.gaussian_kl(*_kl_arguments("meta")).shape == (2,)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        ops.gaussian_kl(*_kl_arguments("meta"))
    assert ops.explain("cpu")["gaussian_kl on meta"] == "fell back to reference: no kernels for meta tensors"


def test_strict_turns_a_fallback_into_an_error_until_it_ends():
    with ops.strict():
        assert ops.explain("meta")["gaussian_kl"].startswith("refused: ")
        with pytest.raises(RuntimeError, match="no kernels for meta tensors"):
            ops.gaussian_kl(*_kl_arguments("meta"))
    assert ops.explain("meta")["gaussian_kl"].startswith("reference: ")
    ops.strict(True)
    assert ops.explain("meta")["gaussian_kl"].startswith("refused: ")


def test_missing_triton_is_the_reason_given(monkeypatch):
    monkeypatch.setattr(ops, "_has_triton", False)
    assert ops.explain("cuda")["correlation"].startswith("reference: triton is not installed")
    with ops.strict():
        assert ops.explain("cuda")["correlation"].startswith("refused: triton is not installed")
    assert ops._decide("cpu", is_double=False)[0] == "reference"


def test_float64_is_not_served_in_float32(monkeypatch):
    assert ops._decide("cuda", is_double=False)[0] == "triton"
    verdict, reason = ops._decide("cuda", is_double=True)
    assert verdict == "reference"
    assert "float64" in reason
    calls = _install_kernel(monkeypatch)
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    monkeypatch.setenv("ADASCOPE_FAST_KERNELS", "triton")
    with pytest.raises(RuntimeError, match="latents are float64"):
        ops.gaussian_kl(*_kl_arguments(dtype=torch.float64))
    assert not calls


def test_import_brings_no_triton_and_asks_no_driver():
    script = (
        "import torch, sys; torch.cuda._lazy_init = lambda: sys.exit('a GPU was touched')\n"
        "from adascope_fast import ops\n"
        "sys.exit('triton was imported' if 'triton' in sys.modules else 0)"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
