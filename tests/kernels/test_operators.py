"""What holds for every operator: torch's own checks, capture by torch.compile, and the number of launches."""

import os
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

if os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("kernels run here under TRITON_INTERPRET=1 alone", allow_module_level=True)

from adascope_fast import ops
from adascope_fast.kernels import gaussian_kl, policy_loss, step, training_gradient, training_step, transition

GENERATOR = torch.Generator().manual_seed(3)
SAMPLE, OUTPUT, UNCOND, PREV, REF, NOISE, X0 = torch.randn(7, 2, 12, generator=GENERATOR).unbind(0)
COEF = 0.5 + torch.rand(2, 3, generator=GENERATOR)
OLD, ADVANTAGE = torch.tensor([-1.0, -1.2]), torch.tensor([1.0, -0.5])
X0_COEF, WEIGHTS = COEF[:, :2].contiguous(), torch.tensor([0.1, 0.2])
BOUNDS = (0.9, 1.1)

ROWS, TABLE, NEXT = torch.tensor([4, 1]), *torch.randn(2, 6, 12, generator=GENERATOR).unbind(0)

POLICY = (SAMPLE, OUTPUT, UNCOND, 2.5, PREV, REF, 1.0, WEIGHTS, COEF, OLD, ADVANTAGE, None, *BOUNDS, True, True, True)
PLAIN = (SAMPLE, OUTPUT, None, 1.0, PREV, None, 0.0, None, COEF, OLD, ADVANTAGE, None, *BOUNDS, False, False, False)
OF_TABLES = (TABLE, OUTPUT, UNCOND, 2.5, NEXT, REF, 0.0, None, COEF, None, ADVANTAGE, ROWS, *BOUNDS, True, True, False)


def _out(n, has_x0, has_prev_x0):
    """Memory for what a step writes."""
    numbers = torch.zeros(3, n).unbind(0)
    x0 = torch.zeros(n, 12) if has_x0 else None
    return torch.zeros(n, 12), numbers[0], x0, numbers[1] if has_prev_x0 else None, numbers[2] if has_x0 else None


CASES: dict[str, tuple[Any, list[tuple]]] = {
    "transition_log_prob": (
        transition.log_prob_op,
        [
            (SAMPLE, OUTPUT, UNCOND, 2.5, PREV, COEF, None, True),
            (SAMPLE, OUTPUT, None, 1.0, PREV, COEF, None, False),
            (TABLE, OUTPUT, None, 1.0, NEXT, COEF, ROWS, True),
        ],
    ),
    "transition_log_prob_backward": (
        transition.log_prob_backward_op,
        [
            *((OLD, SAMPLE, OUTPUT, UNCOND, 2.5, PREV, COEF, None, True, needs) for needs in (True, False)),
            (OLD, TABLE, OUTPUT, UNCOND, 2.5, NEXT, COEF, ROWS, True, True),
        ],
    ),
    "transition_step": (
        step.step_op,
        [
            (*_out(2, True, True), SAMPLE, OUTPUT, UNCOND, 2.5, NOISE, COEF, X0_COEF, X0, None, True),
            (*_out(2, True, False), SAMPLE, OUTPUT, None, 1.0, NOISE, COEF, X0_COEF, None, None, True),
            (*_out(2, False, False), SAMPLE, OUTPUT, None, 1.0, NOISE, COEF, None, None, None, False),
            (*_out(6, True, True), TABLE, OUTPUT, UNCOND, 2.5, NEXT, COEF, X0_COEF, TABLE + NEXT, ROWS, True),
        ],
    ),
    "clipped_policy_loss": (
        policy_loss.clipped_op,
        [(OLD, OLD + 0.1, ADVANTAGE, *BOUNDS, is_ppo) for is_ppo in (True, False)],
    ),
    "transition_policy_loss": (training_step.policy_loss_op, [POLICY, PLAIN, OF_TABLES]),
    "transition_policy_loss_backward": (
        training_step.policy_loss_backward_op,
        [
            (OLD, OLD, SAMPLE, OUTPUT, UNCOND, 2.5, PREV, REF, 1.0, WEIGHTS, COEF, None, True, True),
            (OLD, OLD, SAMPLE, OUTPUT, UNCOND, 2.5, PREV, None, 0.0, None, COEF, None, False, False),
            (OLD, OLD, TABLE, OUTPUT, UNCOND, 2.5, NEXT, None, 0.0, None, COEF, ROWS, True, True),
        ],
    ),
    "transition_policy_grad": (
        training_gradient.policy_grad_op,
        [(*POLICY, 1.0, WEIGHTS), (*PLAIN, 0.5, None), (*OF_TABLES, 0.5, None)],
    ),
    "gaussian_kl": (gaussian_kl.kl_op, [(OUTPUT, REF, COEF)]),
    "gaussian_kl_backward": (gaussian_kl.kl_backward_op, [(OLD, OUTPUT, REF, COEF)]),
}


def test_every_operator_is_among_the_cases():
    """The correlations have theirs in `test_correlation.py`."""
    registered = [name.removeprefix("adascope_fast::") for name in torch._C._dispatch_get_all_op_names()]
    ours = {name for name in registered if "::" not in name and not name.startswith("correlation")}
    assert ours == set(CASES)


def _transposed(arguments):
    """The same values in memory where columns lie together."""
    return tuple(x.t().contiguous().t() if isinstance(x, torch.Tensor) and x.dim() == 2 else x for x in arguments)


@pytest.mark.parametrize("name", CASES)
def test_operators_pass_torch_opcheck(name):
    operator, cases = CASES[name]
    for arguments in cases:
        torch.library.opcheck(operator, arguments)
    torch.library.opcheck(operator, _transposed(cases[0]))


def _rollout(output, uncond):
    guidance = {"output_uncond": uncond, "guidance_scale": 2.5}
    prev_sample, log_prob = ops.transition_step(SAMPLE, output, NOISE, COEF, **guidance)
    more = ops.transition_step_with_x0(SAMPLE, output, NOISE, COEF, X0_COEF, prev_x0=X0, **guidance)
    likeness = ops.correlations(torch.stack([SAMPLE, PREV], 1), X0)
    return [prev_sample, log_prob, *more, ops.correlation(more.x0, X0), likeness]


def _training(output, uncond):
    log_prob = ops.guided_transition_log_prob(SAMPLE, output, uncond, 2.5, PREV, COEF)
    error = ops.transition_log_prob(SAMPLE, output, PREV, COEF, kind="squared_error")
    ppo, _ = ops.clipped_policy_loss(log_prob, OLD, ADVANTAGE, clip_range=0.1)
    dpok, _ = ops.dpok_policy_loss(log_prob, OLD, ADVANTAGE, clip_range=5.0)
    rows = (SAMPLE, output, PREV, COEF, OLD, ADVANTAGE)
    choices: dict[str, Any] = {"output_uncond": uncond, "guidance_scale": 2.5, "ref_output": REF, "kl_weight": WEIGHTS}
    fused, stats = ops.transition_policy_loss(*rows, clip_range=0.1, **choices)
    losses = (log_prob, error, ppo, dpok, fused, ops.gaussian_kl(output, REF, COEF))
    return [torch.stack(losses).sum(), *stats.values()]


def _direct(output, uncond):
    rows = (SAMPLE, output, PREV, COEF, OLD, ADVANTAGE)
    loss, stats, *grads = ops.transition_policy_grad(*rows, clip_range=0.1, output_uncond=uncond, scale=0.5)
    rows = (TABLE, output, NEXT, COEF, None, ADVANTAGE)
    own, more, *others = ops.transition_policy_grad(*rows, clip_range=0.1, output_uncond=uncond, rows=ROWS)
    plain, _ = ops.transition_log_prob_grad(TABLE, output, NEXT, COEF, ADVANTAGE, rows=ROWS)
    return [loss, *stats.values(), *grads, own, *more.values(), *others, plain]


# torch.compile itself instantiates an autograd.Function, and deprecates that.
@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
@pytest.mark.parametrize("function", [_rollout, _training, _direct])
def test_every_door_compiles_without_a_graph_break(function, monkeypatch):
    monkeypatch.undo()  # a trace cannot look into poisoned memory
    monkeypatch.setenv("ADASCOPE_FAST_KERNELS", "triton")
    results = []
    for run in (function, torch.compile(function, fullgraph=True, backend="aot_eager")):
        output, uncond = OUTPUT.clone().requires_grad_(), UNCOND.clone().requires_grad_()
        found = run(output, uncond)
        if found[0].requires_grad:
            found[0].backward()
            found += [output.grad, uncond.grad]
        results.append([x.detach() for x in found])
    for plain, compiled in zip(*results, strict=True):
        assert torch.equal(plain, compiled)


def _compute(operator, arguments, monkeypatch):
    """(kernels that the operator launches, PyTorch operators that it calls and that would launch more)."""
    monkeypatch.undo()  # poisoning fresh memory is a launch too
    launched, called = [], []
    for module in (transition, step, gaussian_kl, policy_loss, training_step, training_gradient):
        monkeypatch.setattr(module, "launch", lambda kernel, grid, *_, **__: launched.append(kernel.__name__))

    class Recorder(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            called.append(function.overloadpacket.__name__)
            return function(*args, **kwargs or {})

    with Recorder():
        LAUNCHERS[operator](*arguments)
    free = {"empty", "empty_like", "new_empty", "new_empty_strided", "detach", "view", "alias", "slice", "select"}
    return launched, [name for name in called if name not in free]


LAUNCHERS = {
    transition.log_prob_op: transition._log_prob,
    transition.log_prob_backward_op: transition._log_prob_backward,
    step.step_op: step._step,
    policy_loss.clipped_op: policy_loss._clipped,
    training_step.policy_loss_op: training_step._policy_loss,
    training_step.policy_loss_backward_op: training_step._policy_loss_backward,
    training_gradient.policy_grad_op: training_gradient._policy_grad,
    gaussian_kl.kl_op: gaussian_kl._kl,
    gaussian_kl.kl_backward_op: gaussian_kl._kl_backward,
}
NUM_LAUNCHES = {
    "transition_log_prob": 2,
    "transition_log_prob_backward": 1,
    "transition_step": 2,
    "clipped_policy_loss": 1,
    "transition_policy_loss": 2,
    "transition_policy_loss_backward": 1,
    "transition_policy_grad": 2,
    "gaussian_kl": 2,
    "gaussian_kl_backward": 1,
}


@pytest.mark.parametrize("name", CASES)
def test_number_of_launches(name, monkeypatch):
    operator, cases = CASES[name]
    for arguments in cases:
        launched, called = _compute(operator, arguments, monkeypatch)
        assert len(launched) == NUM_LAUNCHES[name], launched
        assert called == []


def test_an_empty_batch_launches_nothing():
    empty = [x[:0] for x in (SAMPLE, OUTPUT, PREV, COEF, OLD, ADVANTAGE)]
    loss, stats, grad_output, _ = training_gradient.transition_policy_grad(*empty, clip_range=0.1)
    assert loss.shape == stats["nonfinite"].shape == (0,)
    assert grad_output.shape == (0, 12)
