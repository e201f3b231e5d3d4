"""Matrix products by oneDNN for all layouts of the operands, compared with float64. Other products
stay with torch's own kernels."""

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
    monkeypatch.setattr(cpu_matmul, "SLICE_ELEMENTS", 50 * COLUMNS)  # the last slice is shorter
    library = cpu_matmul.install()
    yield
    library._destroy()


def laid_out(rows: int, columns: int, layout: str) -> Tensor:
    """Return normal random numbers with the given memory layout."""
    matrix = torch.randn(rows, columns)
    if layout == "columns":
        return matrix.t().contiguous().t()
    if layout == "part of rows":
        return torch.cat([matrix, matrix], 1)[:, :columns]
    if layout == "part of columns":
        return torch.cat([matrix.t(), matrix.t()], 1)[:, :rows].t()
    if layout == "scattered":
        return matrix.repeat_interleave(2, 0).repeat_interleave(2, 1)[::2, ::2]
    if layout == "one row":
        return matrix[:1].expand(rows, columns)
    if layout == "one number":
        return matrix[:1, :1].expand(rows, columns)
    assert layout == "rows"
    return matrix


LAYOUTS = (
    "rows", "columns", "part of rows", "part of columns", "scattered", "one row", "one number",
)  # fmt: skip


def ways(a: Tensor, b: Tensor):
    """Yield all ways of multiplying, with the expected result in float64."""
    exact = a.double() @ b.double()
    bias, other = torch.randn(COLUMNS), torch.randn(ROWS, COLUMNS)
    yield "mm", lambda: a @ b, exact
    yield "mm.out", lambda: torch.mm(a, b, out=torch.empty(ROWS, COLUMNS)), exact
    yield "addmm", lambda: torch.addmm(bias, a, b), exact + bias
    yield "addmm_", lambda: other.clone().addmm_(a, b), exact + other


def by_onednn(multiply) -> tuple[Tensor, bool]:
    """Return the product, and True if oneDNN computed it."""
    with profile(activities=[ProfilerActivity.CPU]) as watched:
        product = multiply()
    return product, any("_linear_pointwise" in event.key for event in watched.key_averages())


@pytest.mark.parametrize("right", LAYOUTS)
@pytest.mark.parametrize("left", LAYOUTS)
def test_products_are_exact_for_all_layouts(left, right):
    torch.manual_seed(0)
    a, b = laid_out(ROWS, INNER, left), laid_out(INNER, COLUMNS, right)
    for name, multiply, exact in ways(a, b):
        product, onednn = by_onednn(multiply)
        assert onednn, name
        error = (product.double() - exact).abs().max()
        assert error <= 1e-6 * exact.abs().max(), name


def test_products_with_factors_stay_with_torch():
    torch.manual_seed(0)
    a, b, to = torch.randn(ROWS, INNER), torch.randn(INNER, COLUMNS), torch.randn(ROWS, COLUMNS)
    exact = a.double() @ b.double()
    for multiply, expected in (
        (lambda: torch.addmm(to, a, b), to + exact),
        (lambda: torch.addmm(to, a, b, beta=0.5, alpha=2), 0.5 * to + 2 * exact),
        (lambda: to.clone().addmm_(a, b, beta=0.5), 0.5 * to + exact),
        (lambda: torch.addmm(to[0], a, b, alpha=3, out=torch.empty_like(to)), to[0] + 3 * exact),
    ):
        product, onednn = by_onednn(multiply)
        assert not onednn
        torch.testing.assert_close(product.double(), expected, rtol=0, atol=1e-4)


def test_other_precisions_and_small_matrices_stay_with_torch():
    torch.manual_seed(0)
    whole, half = torch.ones(ROWS, INNER), torch.ones(INNER, COLUMNS, dtype=torch.bfloat16)
    for a, b in (
        (whole.bfloat16(), half),
        (whole.double(), half.double()),
        (whole[:4], half[:, :4]),
    ):
        product, onednn = by_onednn(partial(torch.matmul, a, b.to(a)))
        assert not onednn
        assert product.dtype == a.dtype
        assert (product == INNER).all()
    assert (torch.ones(0, 4) @ torch.ones(4, 3)).shape == (0, 3)


def test_shapes_that_do_not_match_are_refused():
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        torch.randn(ROWS, INNER) @ torch.randn(COLUMNS, ROWS)


@pytest.mark.parametrize("bias", [True, False])
def test_a_layer_learns_the_same(bias):
    torch.manual_seed(0)
    layer = torch.nn.Linear(INNER, COLUMNS, bias)
    states = torch.randn(4, ROWS, INNER, requires_grad=True)
    loss, onednn = by_onednn(lambda: layer(states).square().sum())
    assert onednn
    _, onednn = by_onednn(loss.backward)
    assert onednn
    gradients = [states.grad, *(p.grad for p in layer.parameters())]
    exactly = torch.nn.Linear(INNER, COLUMNS, bias).double()
    exactly.load_state_dict(layer.state_dict())
    wide = states.detach().double().requires_grad_()
    exactly(wide).square().sum().backward()
    references = [wide.grad, *(p.grad for p in exactly.parameters())]
    for gradient, reference in zip(gradients, references, strict=True):
        assert (gradient.double() - reference).abs().max() <= 1e-5 * reference.abs().max()


@pytest.mark.parametrize(
    ("vendor", "capability", "taken"),
    [
        ("AuthenticAMD", "AVX512", True),
        ("AuthenticAMD", "AVX2", False),
        ("GenuineIntel", "AVX512", False),
        (None, "AVX512", False),
    ],
)
def test_onednn_is_used_where_mkl_is_slow(vendor, capability, taken, tmp_path, monkeypatch):
    cpus = tmp_path / "cpuinfo"
    if vendor:
        cpus.write_text(f"processor\t: 0\nvendor_id\t: {vendor}\n")
    monkeypatch.setattr(cpu_matmul, "CPUS", cpus)
    monkeypatch.setattr(cpu_matmul, "install", lambda: "installed")
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: capability)
    monkeypatch.setattr(torch.backends.mkl, "is_available", lambda: True)
    assert cpu_matmul.use_onednn.__wrapped__() == ("installed" if taken else None)


def test_a_teacher_on_cpu_cores_uses_onednn(tiny, monkeypatch):
    from actors import teacher
    from seqkd.config.teacher import HfTeacherConfig

    called = []
    monkeypatch.setattr(teacher, "use_onednn", lambda: called.append(True))
    teacher.HfStates(HfTeacherConfig(kind="hf", model=tiny["teacher"]), 64)
    assert called == [True]
