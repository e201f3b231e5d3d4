"""Products of matrices by oneDNN: those of float64, whatever the operands; and torch's own where
they are not for it."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from actors import cpu_matmul

ROWS, INNER, COLUMNS = 120, 130, 140

pytestmark = pytest.mark.skipif(
    not torch.backends.mkldnn.is_available(), reason="this torch is built without oneDNN"
)


@pytest.fixture(autouse=True)
def installed(monkeypatch):
    monkeypatch.setattr(
        cpu_matmul, "SLICE_ELEMENTS", 50 * COLUMNS
    )  # the last slice is a shorter one
    library = cpu_matmul.install()
    yield
    library._destroy()


def laid_out(rows: int, columns: int, how: str) -> Tensor:
    """Normal numbers of this shape, which lie in memory as ``how`` says."""
    made = torch.randn(rows, columns)
    if how == "columns":
        return made.t().contiguous().t()
    if how == "part of rows":
        return torch.cat([made, made], 1)[:, :columns]
    if how == "part of columns":
        return torch.cat([made.t(), made.t()], 1)[:, :rows].t()
    if how == "scattered":
        return made.repeat_interleave(2, 0).repeat_interleave(2, 1)[::2, ::2]
    if how == "one row":
        return made[:1].expand(rows, columns)
    if how == "one number":
        return made[:1, :1].expand(rows, columns)
    assert how == "rows"
    return made


LAYOUTS = (
    "rows", "columns", "part of rows", "part of columns", "scattered", "one row", "one number",
)  # fmt: skip


def ways(a: Tensor, b: Tensor):
    """Each way of multiplying, and what it must give, in float64."""
    exact = a.double() @ b.double()
    bias, other = torch.randn(COLUMNS), torch.randn(ROWS, COLUMNS)
    yield "mm", lambda: a @ b, exact
    yield "mm.out", lambda: torch.mm(a, b, out=torch.empty(ROWS, COLUMNS)), exact
    yield "addmm", lambda: torch.addmm(bias, a, b), exact + bias
    yield "addmm_", lambda: other.clone().addmm_(a, b), exact + other


def by_onednn(multiply) -> tuple[Tensor, bool]:
    """The product, and whether oneDNN made it."""
    with profile(activities=[ProfilerActivity.CPU]) as watched:
        product = multiply()
    return product, any("_linear_pointwise" in event.key for event in watched.key_averages())


@pytest.mark.parametrize("right", LAYOUTS)
@pytest.mark.parametrize("left", LAYOUTS)
def test_whatever_lies_where_the_product_is_exact(left, right):
    torch.manual_seed(0)
    a, b = laid_out(ROWS, INNER, left), laid_out(INNER, COLUMNS, right)
    for name, multiply, exact in ways(a, b):
        product, ours = by_onednn(multiply)
        assert ours, name
        error = (product.double() - exact).abs().max()
        assert error <= 1e-6 * exact.abs().max(), name


def test_factors_are_torchs_to_multiply():
    torch.manual_seed(0)
    a, b, to = torch.randn(ROWS, INNER), torch.randn(INNER, COLUMNS), torch.randn(ROWS, COLUMNS)
    exact = a.double() @ b.double()
    for multiply, expected in (
        (lambda: torch.addmm(to, a, b), to + exact),
        (lambda: torch.addmm(to, a, b, beta=0.5, alpha=2), 0.5 * to + 2 * exact),
        (lambda: to.clone().addmm_(a, b, beta=0.5), 0.5 * to + exact),
        (lambda: torch.addmm(to[0], a, b, alpha=3, out=torch.empty_like(to)), to[0] + 3 * exact),
    ):
        product, ours = by_onednn(multiply)
        assert not ours
        torch.testing.assert_close(product.double(), expected, rtol=0, atol=1e-4)


def test_other_precisions_and_small_matrices_are_torchs():
    torch.manual_seed(0)
    whole, half = torch.ones(ROWS, INNER), torch.ones(INNER, COLUMNS, dtype=torch.bfloat16)
    for a, b in (
        (whole.bfloat16(), half),
        (whole.double(), half.double()),
        (whole[:4], half[:, :4]),
    ):
        product, ours = by_onednn(partial(torch.matmul, a, b.to(a)))
        assert not ours
        assert product.dtype == a.dtype
        assert (product == INNER).all()
    assert (torch.ones(0, 4) @ torch.ones(4, 3)).shape == (0, 3)


def test_what_does_not_fit_is_refused_as_before():
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        torch.randn(ROWS, INNER) @ torch.randn(COLUMNS, ROWS)


@pytest.mark.parametrize("bias", [True, False])
def test_a_layer_learns_the_same(bias):
    torch.manual_seed(0)
    layer = torch.nn.Linear(INNER, COLUMNS, bias)
    states = torch.randn(4, ROWS, INNER, requires_grad=True)
    loss, ours = by_onednn(lambda: layer(states).square().sum())
    assert ours
    _, ours = by_onednn(loss.backward)
    assert ours
    found = [states.grad, *(p.grad for p in layer.parameters())]
    exactly = torch.nn.Linear(INNER, COLUMNS, bias).double()
    exactly.load_state_dict(layer.state_dict())
    wide = states.detach().double().requires_grad_()
    exactly(wide).square().sum().backward()
    for ours, theirs in zip(
        found, [wide.grad, *(p.grad for p in exactly.parameters())], strict=True
    ):
        assert (ours.double() - theirs).abs().max() <= 1e-5 * theirs.abs().max()


@pytest.mark.parametrize(
    ("vendor", "capability", "taken"),
    [
        ("AuthenticAMD", "AVX512", True),
        ("AuthenticAMD", "AVX2", False),
        ("GenuineIntel", "AVX512", False),
        (None, "AVX512", False),
    ],
)
def test_it_is_taken_where_mkl_is_slow(vendor, capability, taken, tmp_path, monkeypatch):
    cpus = tmp_path / "cpuinfo"
    if vendor:
        cpus.write_text(f"processor\t: 0\nvendor_id\t: {vendor}\n")
    monkeypatch.setattr(cpu_matmul, "CPUS", cpus)
    monkeypatch.setattr(cpu_matmul, "install", lambda: "installed")
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: capability)
    monkeypatch.setattr(torch.backends.mkl, "is_available", lambda: True)
    assert cpu_matmul.use_onednn.__wrapped__() == ("installed" if taken else None)


def test_a_teacher_on_cores_takes_it(tiny, monkeypatch):
    from actors import teacher
    from seqkd.config.teacher import HfTeacherConfig

    called = []
    monkeypatch.setattr(teacher, "use_onednn", lambda: called.append(True))
    teacher.HfStates(HfTeacherConfig(kind="hf", model=tiny["teacher"]), 64)
    assert called == [True]
