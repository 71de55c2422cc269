"""Which attention a model with sinks gets: none that computes something else."""

from __future__ import annotations

import pytest
import tiny
import torch

from job.train import attention
from job.train.attention import Case, choose, difference, fault, make_case

CONFIG = tiny.tiny_config("gpt_oss")


def case_of(window=8, dtype=torch.float32):
    return make_case(CONFIG, dtype, "cpu", window=window, packed=True)


def changed(**fields):
    """The definition, but of another case: what a kernel without these would compute."""

    def kernel(case: Case):
        own = {name: getattr(case, name) for name in case.__dataclass_fields__}
        return attention._definition(Case(**{**own, **fields}))

    return kernel


def test_the_definition_is_transformers_own_eager_attention():
    """Forward and backward, sinks and all: in fp32 to rounding."""
    from types import SimpleNamespace

    from transformers.models.gpt_oss.modeling_gpt_oss import eager_attention_forward

    from job.train.collator import _mask

    case = case_of()

    def eager(case: Case):
        module = SimpleNamespace(num_key_value_groups=2, sinks=case.sinks, training=True)
        mask = _mask(case.documents, case.window, "eager", torch.float32)
        return eager_attention_forward(module, case.q, case.k, case.v, mask, scaling=case.scaling)[
            0
        ]

    assert difference(eager, case) < 1e-4


@pytest.mark.parametrize(
    "wrong",
    [
        {"sinks": torch.full((4,), -1e9)},
        {"window": None},
        {"window": 9},
        {"documents": torch.ones(1, attention.TOKENS, dtype=torch.int64)},
        {"scaling": 0.2},
    ],
    ids=["no sinks", "no window", "a window too wide", "a leak", "another scale"],
)
def test_a_kernel_that_computes_something_else_fails(monkeypatch, wrong):
    """Whatever it leaves out shows, in fp32 and in bf16."""
    for dtype in (torch.float32, torch.bfloat16):
        monkeypatch.setitem(attention.KERNELS, "flex_attention", changed(**wrong))
        assert "differs from eager" in fault("flex_attention", CONFIG, dtype, "cpu")
        monkeypatch.setitem(attention.KERNELS, "flex_attention", changed())
        assert fault("flex_attention", CONFIG, dtype, "cpu") is None


def test_a_wrong_backward_fails(monkeypatch):
    """Its forward is right, and the gradient of v is not."""

    def kernel(case: Case):
        return attention._definition(case) + (case.v - case.v.detach()).sum()

    monkeypatch.setitem(attention.KERNELS, "flex_attention", kernel)
    assert "differs from eager" in fault("flex_attention", CONFIG, torch.float32, "cpu")


def test_what_cannot_run_here_is_passed_over():
    """On a CPU flex attention has no sinks, and FlashAttention is not installed."""
    name, reason = choose(CONFIG, torch.float32, "cpu")
    assert name == "eager"
    assert "not flex_attention: fails here (" in reason
    assert "not flash_attention_4: is not installed" in reason
    assert "\n" not in reason


@pytest.mark.parametrize(
    ("faults", "wanted"),
    [
        ({}, "flex_attention"),
        ({"flex_attention": "differs"}, "flash_attention_4"),
        ({"flex_attention": "differs", "flash_attention_4": "is not installed"}, "eager"),
    ],
)
def test_the_first_that_is_right_is_taken(faults, wanted):
    """With one reason that names those before it."""
    name, reason = choose(CONFIG, torch.bfloat16, "cuda", fault_of=lambda n, *_: faults.get(n))
    assert name == wanted
    assert all(f"not {n}: {why}" in reason for n, why in faults.items())
