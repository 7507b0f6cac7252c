"""Work that is replayed gives the bits of work that is done, and what a replay cannot know is caught.

On the CPU by an emulation that freezes what a CUDA graph freezes; `tests/test_gpu.py` has the same with graphs.
"""

import logging
from dataclasses import dataclass
from typing import Any, NamedTuple

import pytest
import torch
from graph_emulation import Emulation
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from adascope_fast.engine.graphs import GradientBuffers, Graphs

GENERATOR = torch.Generator()


class Told(NamedTuple):
    """Graphs, what emulates them, and the lines that they told."""

    graphs: Graphs
    backend: Emulation
    lines: list[str]


@pytest.fixture
def told() -> Told:
    lines: list[str] = []
    backend = Emulation()
    return Told(Graphs(backend, tell=lines.append), backend, lines)


def _rows(count: int, seed: int = 0) -> Tensor:
    return torch.randn(count, 5, generator=torch.Generator().manual_seed(seed))


def test_a_shape_is_recorded_at_its_second_use_and_replayed_from_then_on(told: Told):
    calls = []

    def work(x: Tensor) -> Tensor:
        calls.append(len(x))
        return x.sin() * 2

    for use in range(5):
        for count in (3, 4):
            x = _rows(count, use)
            assert torch.equal(told.graphs("work", work, x), x.sin() * 2)
    assert calls == [3, 4, 3, 4], "of each shape one was done and one recorded"
    assert told.backend.num_replays == told.graphs.num_replays == 8
    assert [line.partition(",")[0] for line in told.lines] == ["CUDA graphs: work is recorded"] * 2
    assert "graph 2 of at most 32" in told.lines[1]
    assert told.graphs.words().startswith("on: 2 graphs of 0.00 GiB served 8 of 10 calls")


@dataclass(frozen=True)
class Batch:
    rows: Tensor
    scale: float
    more: dict[str, Any]


def test_structures_are_inputs_and_their_numbers_choose_the_graph(told: Told):
    def work(batch: Batch, pair: tuple[Tensor, None]) -> dict[str, Tensor]:
        return {"sum": batch.rows * batch.scale + batch.more["shift"] + pair[0]}

    for use in range(4):
        for scale in (2.0, 3.0):
            rows, shift, other = _rows(3, use), _rows(3, use + 10), _rows(3, use + 20)
            got = told.graphs("work", work, Batch(rows, scale, {"shift": shift}), (other, None))
            assert torch.equal(got["sum"], rows * scale + shift + other)
    assert told.backend.num_replays == 6
    assert len(told.lines) == 2


def test_a_number_that_is_not_told_is_frozen(told: Told):
    """What the emulation is for: the third call is not what it would be without graphs."""
    x, number = _rows(3), 0.0

    def work(x: Tensor) -> Tensor:
        return x * number

    got = []
    while number < 3:
        number += 1
        got.append(told.graphs("work", work, x).clone())
    assert torch.equal(got[1], x * 2)
    assert torch.equal(got[2], x * 2)
    for number in (1.0, 2.0, 3.0, 1.0):
        assert torch.equal(told.graphs("work", work, x, host=number), x * number)


def test_the_device_may_count_where_the_host_may_not(told: Told):
    table, step, log = torch.arange(6.0), torch.zeros(1, dtype=torch.int64), torch.zeros(6)

    def work() -> None:
        log[step] = table[step] + 1
        step.add_(1)

    for _ in range(6):
        told.graphs("work", work, fixed=(table, step, log))
    assert told.backend.num_replays == 5
    assert log.tolist() == [1.0, 2.0, 3.0, 4.0, 5.0, 6.0]


def test_recording_does_nothing(told: Told):
    """The second use is recorded, then replayed: in place of what it adds to, it adds once."""
    total = torch.zeros(3, 5)
    for use in range(3):
        told.graphs("work", lambda x: total.add_(x).sum(), _rows(3, use), fixed=(total,))
    assert torch.equal(total, _rows(3, 0) + _rows(3, 1) + _rows(3, 2))


def test_a_table_elsewhere_is_another_graph(told: Told):
    table, other = _rows(4, 1), _rows(4, 2)

    def work(rows: Tensor) -> Tensor:
        return table[rows]

    for index in ([0, 1], [2, 3], [3, 0]):
        rows = torch.tensor(index)
        for _ in range(2):
            assert torch.equal(told.graphs("work", work, rows, fixed=(table,)), table[rows])
            table, other = other, table
    assert len(told.lines) == 2


def test_results_last_until_the_next_call(told: Told):
    x = _rows(3)
    for _ in range(3):
        one = told.graphs("one", lambda x: x + 1, x)
        assert torch.equal(one, x + 1)
        other = told.graphs("other", lambda x: x + 2, x)
        assert torch.equal(other, x + 2)
    assert not one.isfinite().any(), "graphs share their memory"


@pytest.mark.parametrize(
    ("work", "reason"),
    [
        (lambda x: x * x.sum().item(), "waits for the device"),
        (lambda x: x[x > 0].sum(), "waits for the device"),
        (lambda x: x.nonzero(), "waits for the device"),
        (lambda x: x + torch.tensor([1.0]), "host's values"),
        (lambda x: x + torch.rand(5), "draws from a generator"),
        (lambda x: x + torch.rand(5, generator=GENERATOR.manual_seed(1)), "draws from a generator"),
        (lambda x: torch.dropout(x, 0.5, train=True), "draws from a generator"),
        (lambda x: checkpoint(torch.sin, x, use_reentrant=False), "state of a generator"),
    ],
)
def test_what_cannot_be_recorded_is_told_once_and_done(told: Told, work: Any, reason: str):
    for use in range(4):
        x = _rows(3, use)
        torch.manual_seed(use)
        want = work(x)
        torch.manual_seed(use)
        assert torch.equal(told.graphs("work", work, x), want)
    assert told.backend.num_replays == 0
    (line,) = told.lines
    assert line.startswith("CUDA graphs: work cannot be recorded and runs without: ")
    assert reason in line
    assert f"; not work: {line.partition('without: ')[2]}" in told.graphs.words()


def test_the_first_of_the_errors_is_told(told: Told):
    """The end of a recording that failed raises again, with more words and less sense."""

    def capture(work: Any) -> Any:
        try:
            Emulation.capture(told.backend, work)
        finally:
            raise RuntimeError("capture was invalidated\nand more")

    told.backend.capture = capture  # type: ignore[method-assign]
    for _ in range(2):
        told.graphs("work", lambda x: x.sum().item(), _rows(3))
    assert "waits for the device" in told.lines[0]


def test_other_errors_are_the_callers(told: Told):
    def work(x: Tensor) -> Tensor:
        if uses:
            raise ValueError("wrong")
        uses.append(1)
        return x

    uses: list[int] = []
    told.graphs("work", work, _rows(3))
    with pytest.raises(ValueError, match="wrong"):
        told.graphs("work", work, _rows(3))


def test_the_number_of_graphs_is_bounded_and_told(told: Told):
    graphs = Graphs(told.backend, most=2, tell=told.lines.append)
    for use in range(3):
        for count in (1, 2, 3, 4):
            x = _rows(count, use)
            assert torch.equal(graphs("work", torch.cos, x), x.cos())
    assert graphs.num_replays == 4
    assert told.lines[2:] == ["CUDA graphs: no more than 2 are kept, so further shapes run without"]


def test_weights_that_move_are_noticed(told: Told):
    layer, x = nn.Linear(5, 5), _rows(3)
    with torch.no_grad():
        for _ in range(3):
            told.graphs.watch(layer.parameters())
            told.graphs("work", layer, x)
        layer.weight.data = layer.weight.data + 1
        stale = told.graphs("work", layer, x).clone()
        assert not torch.equal(stale, layer(x)), "a graph reads the old address"
        told.graphs.watch(layer.parameters())
        for _ in range(3):
            assert torch.equal(told.graphs("work", layer, x), layer(x))
        layer.weight.mul_(2)
        told.graphs.watch(layer.parameters())
        assert torch.equal(told.graphs("work", layer, x), layer(x))
    assert "the weights have moved" in told.lines[1]
    assert len(told.lines) == 3


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(5, 7), nn.SiLU(), nn.Linear(7, 3))

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x)


def _net() -> Net:
    torch.manual_seed(3)
    return Net()


@pytest.mark.parametrize("is_checkpointed", [False, True])
@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
def test_forward_and_backward_add_the_same_gradient(told: Told, dtype: torch.dtype | None, is_checkpointed: bool):
    """Over several updates, in which the weights move in place."""

    def made(graphs: Graphs | None) -> list[Tensor]:
        net, losses = _net(), []
        optimizer = torch.optim.AdamW(net.parameters(), lr=0.01, fused=True)
        buffers = GradientBuffers(list(net.parameters()))

        def work(x: Tensor, weight: Tensor) -> Tensor:
            with torch.autocast("cpu", dtype=dtype, enabled=dtype is not None):
                if is_checkpointed:
                    output = checkpoint(net, x, use_reentrant=False, preserve_rng_state=False)
                else:
                    output = net(x)
            loss = (output.float().square().sum(1) * weight).sum()
            loss.backward()
            return loss.detach()

        for update in range(4):
            buffers.clear()
            for part in range(2):
                inputs = _rows(6, 10 * update + part), _rows(6, part)[:, 0]
                # An outer context that keeps its casts, as a whole rollout's does.
                with torch.autocast("cpu", dtype=dtype, enabled=dtype is not None):
                    loss = work(*inputs) if graphs is None else graphs("work", work, *inputs)
                losses.append(loss.clone())
            optimizer.step()
        return [*losses, *(parameter.detach() for parameter in net.parameters())]

    want, got = made(None), made(told.graphs)
    assert told.backend.num_replays == 7
    for one, other in zip(got, want, strict=True):
        assert torch.equal(one, other)


def test_gradients_that_are_taken_away_are_a_graphs_loss(told: Told):
    """The trap that `GradientBuffers` is for; and it puts back what was taken away."""
    net, x = _net(), _rows(4)
    parameters, buffers = list(net.parameters()), GradientBuffers(list(net.parameters()))

    def work(x: Tensor) -> None:
        net(x).sum().backward()

    buffers.clear()
    for _ in range(2):
        told.graphs("work", work, x)
    net.zero_grad(set_to_none=True)
    told.graphs("work", work, x)
    assert all(parameter.grad is None for parameter in parameters)
    buffers.clear()
    told.graphs("work", work, x)
    for parameter, want in zip(parameters, torch.autograd.grad(net(x).sum(), parameters), strict=True):
        torch.testing.assert_close(parameter.grad, want, rtol=0, atol=0)


def test_modes_of_the_host_are_told_apart(told: Told):
    net, x = _net(), _rows(4)
    for _ in range(3):
        assert told.graphs("work", net, x).requires_grad
        with torch.no_grad():
            assert not told.graphs("work", net, x).requires_grad
            with torch.autocast("cpu", dtype=torch.bfloat16):
                assert told.graphs("work", net, x).dtype == torch.bfloat16
    assert len(told.lines) == 3


def test_lines_are_logged_where_nobody_listens(caplog: pytest.LogCaptureFixture):
    graphs = Graphs(Emulation())
    with caplog.at_level(logging.INFO):
        for _ in range(2):
            graphs("work", torch.sin, _rows(2))
    assert "work is recorded" in caplog.text
