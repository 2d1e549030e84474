"""Where Lanczos vectors are kept: the same numbers, bounded memory, and honest intervals in bfloat16."""

from itertools import islice

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from lightning_maml_guard.linalg import krylov_basis as kept
from lightning_maml_guard.linalg.arnoldi import arnoldi
from lightning_maml_guard.linalg.krylov_basis import BASES, Basis
from lightning_maml_guard.linalg.lanczos import lanczos, start_vector
from lightning_maml_guard.stability.krylov_stopping import Krylov, run_lanczos
from lightning_maml_guard.theory.complex_ritz import complex_limit, complex_ritz
from lightning_maml_guard.theory.critical_rates import critical_rates
from lightning_maml_guard.theory.linear_response import Response
from lightning_maml_guard.theory.ritz import rates_from_lanczos, ritz_values
from tests.linalg.test_lanczos import matrix_of
from tests.stability.test_hvp import spectra
from tests.theory.test_complex_ritz import random_matrix


@pytest.fixture
def small_panels(monkeypatch):
    """Panels of 16 entries, 64 at once: what a network of millions of parameters meets."""
    monkeypatch.setattr(kept, "_HOST_PANEL", 16)
    monkeypatch.setattr(kept, "_HOST_GROUP", 64)


def filled(kind, count=5, shape=(67,), dtype=torch.float64):
    like = torch.zeros(shape, dtype=dtype)
    found = Basis(count, like, kind)
    directions = np.linalg.qr(np.random.default_rng(0).standard_normal((shape[-1], count)))[0].T
    for direction in torch.as_tensor(directions, dtype=dtype):
        found.append(direction.expand(shape).contiguous())
    return found


@pytest.mark.parametrize("size", [67, 64])
@pytest.mark.parametrize("kind", BASES)
def test_products_with_all_vectors_are_those_with_each(small_panels, kind, size):
    found, rows = filled(kind, shape=(size,)), torch.as_tensor(np.random.default_rng(1).standard_normal((3, size)))
    torch.testing.assert_close(found.products(rows), rows @ found.dense().T, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("shape", [(67,), (64,), (3, 67), (2, 3, 5)])
@pytest.mark.parametrize("kind", BASES)
def test_panels_give_what_dense_algebra_gives(small_panels, kind, shape):
    found = filled(kind, shape=shape)
    vectors = found.dense()
    vector = torch.as_tensor(np.random.default_rng(1).standard_normal(shape))
    before = vector.clone()
    rest = found.without(vector)
    assert torch.equal(vector, before)
    v = vectors.reshape(5, -1, shape[-1]).transpose(0, 1).numpy()  # by block
    for block, target, left, taken in zip(
        v,
        vector.reshape(-1, shape[-1]),
        rest.vector.reshape(-1, shape[-1]),
        rest.coefficients.reshape(5, -1).T,
        strict=True,
    ):
        exact = np.linalg.lstsq(block.T, target.numpy(), rcond=None)[0]
        # Three passes of Gram-Schmidt leave |D|^3 with |D| about 2^-9.
        atol = 1e-13 if found.exact else 5e-7
        np.testing.assert_allclose(taken, exact, atol=atol)
        np.testing.assert_allclose(left, target.numpy() - exact @ block, atol=atol)
        np.testing.assert_allclose(np.linalg.norm(block, axis=1), 1, rtol=1e-12)
    weights = torch.tensor([0.5, -2.0, 3.0], dtype=torch.float64)
    torch.testing.assert_close(found.combine(weights), torch.tensordot(weights, vectors[:3], 1), rtol=0, atol=1e-13)


def test_overlaps_are_measured(small_panels):
    found = filled("bfloat16", shape=(4, 30))
    rows = found.dense()
    gram = torch.einsum("kbn,bn->kb", rows, rows[-1])[:-1]
    assert gram.abs().max() > 1e-5  # there is something to measure
    overlap = found.without(rows[0]).overlap
    torch.testing.assert_close(overlap, torch.linalg.vector_norm(gram, dim=0), rtol=1e-9, atol=0)
    assert filled("device").without(torch.ones(67, dtype=torch.float64)).overlap == 0


def test_float32_products_of_long_vectors_are_as_sharp_as_float32():
    n = 3_000_001
    generator = torch.Generator().manual_seed(0)
    like = torch.randn(n, generator=generator)
    found = Basis(2, like)
    found.append(like / torch.linalg.vector_norm(like.double()).float())
    found.append(torch.ones(n) / n**0.5)
    vector = torch.rand(n, generator=generator) + 3 * like
    rest = found.without(vector).vector.double()
    for row in found.dense().double():
        assert abs(row @ rest) < 1e-6 * torch.linalg.vector_norm(vector.double())


class Largest(TorchDispatchMode):
    """Entries of the largest tensor an operation makes."""

    entries = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        made = function(*args, **(kwargs or {}))
        of_its_own = not any(each.alias_info for each in function._schema.returns)
        if of_its_own and function.overloadpacket is not torch.ops.aten.empty:  # the basis itself
            tensors = [each for each in tree_leaves(made) if isinstance(each, torch.Tensor)]
            self.entries = max([self.entries, *(each.numel() for each in tensors)])
        return made


@pytest.mark.parametrize("kind", BASES)
@pytest.mark.parametrize("run", [lanczos, arnoldi])
def test_nothing_as_large_as_the_basis_is_made_beside_it(small_panels, kind, run):
    scale = torch.linspace(0, 1, 500)
    with Largest() as largest:
        run(lambda v: scale * v, start_vector((500,), scale), max_iter=12, basis=kind)
    # A vector, to whole panels; a panel of all 12 has 12 * 16 entries, their products 32 * 12.
    assert 500 <= largest.entries <= 512


@pytest.mark.parametrize("kind", BASES)
def test_what_is_multiplied_is_what_is_kept(small_panels, kind):
    matrix, seen = matrix_of(np.linspace(-1, 4, 50)).float(), []
    run = lanczos(
        lambda v: (seen.append(v.clone()), matrix @ v)[1], start_vector((50,), matrix), max_iter=9, basis=kind
    )
    for vector, row in zip(seen, run.basis.dense(), strict=True):
        torch.testing.assert_close(vector, row, rtol=1e-6, atol=1e-8)
        assert torch.linalg.vector_norm(vector.double()) == pytest.approx(1, abs=1e-6)
    if kind == "bfloat16":
        ratios = run.basis.dense() / run.basis._scales.T
        assert torch.equal(ratios.bfloat16().float(), ratios) or (ratios - ratios.bfloat16().float()).abs().max() < 1e-7


@pytest.mark.parametrize("batch", [(), (3,)])
def test_off_the_device_the_numbers_are_the_same_bits(small_panels, batch):
    scale = torch.linspace(-1, 3, 150)
    start = start_vector((*batch, 150), scale)
    here, there = (lanczos(lambda v: scale * v, start, max_iter=20, basis=kind) for kind in ("device", "cpu"))
    assert here.runs == there.runs and torch.equal(here.basis.dense(), there.basis.dense())
    if not batch:
        here, there = (
            arnoldi(lambda v: scale * v.roll(1), start, max_iter=20, basis=kind) for kind in ("device", "cpu")
        )
        assert np.array_equal(here.hessenberg, there.hessenberg) and here.spill == there.spill == 0


def test_the_recurrence_of_a_rounded_basis_is_off_by_no_more_than_it_says(small_panels):
    for seed in range(30):
        matrix = matrix_of(np.random.default_rng(seed).uniform(-2, 5, 40), seed)
        run = lanczos(lambda v, m=matrix: m @ v, start_vector((40,), matrix), max_iter=20, basis="bfloat16")
        main, off = (torch.tensor(part, dtype=torch.float64) for part in run.runs[0])
        t = torch.diag(main) + torch.diag(off[:-1], 1) + torch.diag(off[:-1], -1)
        v = run.basis.dense().T
        rest = matrix @ v - v @ t
        rest[:, -1] = 0  # what leaves the space, by design
        scale = max(main.abs().max(), off.max())
        assert 1e-4 < float(torch.linalg.matrix_norm(rest)) / scale <= run.rounding < 0.02


def test_intervals_of_a_rounded_basis_hold_over_many_spectra():
    """Against dense eigenvalues: lambda_max, the curvature of simplified MAML for a random alpha, and every Ritz value."""
    outside, widths = [], []
    for index, (_, q, values) in enumerate(islice(spectra(), 300)):
        tol = (1e-2, 1e-4)[index % 2]
        matrix = torch.as_tensor(q * values @ q.T)
        size, alpha = np.abs(values).max(), (index % 7) / 7 / max(values.max(), 1e-9)
        alpha = alpha if values.max() > 0 else 0.0
        krylov = Krylov(20, tol, "bfloat16")
        run = run_lanczos(lambda v, m=matrix: m @ v, len(values), matrix, None, krylov=krylov, alpha=alpha)
        found = rates_from_lanczos(*run.runs[0], alpha, rounding=1e-14 + run.rounding, resolution=tol)
        truth = critical_rates(values, alpha)
        for (low, high), true in (
            (found.lambda_max_interval, values.max()),
            (found.curvature_interval, truth.curvature),
            (found.beta_c_interval, truth.beta_c),
        ):
            slack = 1e-12 * min(size, abs(true)) if np.isfinite(true) else 0.0
            outside += [index] * (not low - slack <= true <= high + slack)
        ritz, bounds = ritz_values(*run.runs[0])
        radius = np.abs(ritz).max() + run.runs[0].off_diagonal[-1]
        near = [
            np.abs(values - each).min() <= bound + (1e-14 + run.rounding) * radius
            for each, bound in zip(ritz, bounds, strict=True)
        ]
        outside += [index] * (not all(near))
        widths.append(run.rounding)
    assert not outside
    assert np.median(widths) < 1e-2  # and they are worth having


@pytest.mark.parametrize("skew", [0.0, 0.02, 0.1])
def test_limits_of_a_rounded_basis_hold_where_the_matrix_is_not_symmetric(skew):
    sharp = 0
    for seed in range(10):
        matrix = random_matrix(seed, 60, skew)
        device = torch.as_tensor(matrix)
        true = min(2 * mu.real / abs(mu) ** 2 for mu in np.linalg.eigvals(matrix) if mu.real > 0 and abs(mu) > 0.06)
        run = arnoldi(lambda v, m=device: m @ v, start_vector((60,), device), max_iter=40, basis="bfloat16")
        v = run.basis.dense().numpy().T
        rest = matrix @ v - v @ run.hessenberg
        assert np.linalg.norm(rest[:, :-1]) <= run.spill < 0.1
        limit = complex_limit(complex_ritz(run.hessenberg, run.residual, 0.0, run.spill), (Response(),), tol=1e-2)
        assert limit.interval[0] <= true <= limit.interval[1]
        sharp += limit.interval[0] > 0.9 * true
    assert sharp >= 5
