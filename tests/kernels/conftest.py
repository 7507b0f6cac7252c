"""Fresh memory is NaN in these tests, so a kernel that leaves an element unwritten is seen."""

import math

import pytest
import torch


@pytest.fixture(autouse=True)
def poisoned_memory(monkeypatch):
    def poison(make):
        def made(*args, **kwargs):
            memory = make(*args, **kwargs)
            if memory.is_floating_point() and not memory.is_meta:
                memory.detach().fill_(math.nan)
            return memory

        return made

    monkeypatch.setattr(torch, "empty", poison(torch.empty))
    monkeypatch.setattr(torch, "empty_like", poison(torch.empty_like))
    monkeypatch.setattr(torch.Tensor, "new_empty", poison(torch.Tensor.new_empty))
    monkeypatch.setattr(torch.Tensor, "new_empty_strided", poison(torch.Tensor.new_empty_strided))
