"""Encoder and decoder: symmetry, directions against dense linear algebra, statistics."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from lolgen import gl, metrics
from lolgen.errors import ShapeError, SpecError
from lolgen.lora import Batch, ModuleSpec, Spec
from lolgen.nn import (
    Decoder,
    DecoderConfig,
    Encoder,
    EncoderConfig,
    Spectrum,
    principal_directions,
    right_inverse,
)
from lolgen.nn.directions import _principal
from lolgen.testing import assert_equivariant, assert_invariant, random_lora

from .tiny import OTHER_SHAPE, RANKS, SPEC, awaken, batch

CONFIG = EncoderConfig(d=4, mix=1, mix_rank=2, p=3, top=2, features=8, width=8, heads=2)
LINEAR = EncoderConfig(d=3, p=2, top=2, features=8, width=8, heads=2)


def trained(dtype: torch.dtype, config: EncoderConfig = CONFIG) -> Encoder:
    encoder = Encoder.from_batch(batch([2] * 12, dtype=dtype, seed=5), config).to(dtype)
    awaken(encoder)
    encoder.fit(batch([2] * 12, dtype=dtype, seed=5))
    return encoder


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("ranks", RANKS.values(), ids=RANKS)
def test_encoder_and_decoder_keep_the_symmetry(ranks: list[int], dtype: torch.dtype) -> None:
    encoder = trained(dtype)
    decoder = awaken(Decoder(SPEC, DecoderConfig(d=4, mix=1, mix_rank=2, heads=2)).to(dtype))
    for zero in ((), ("q",)):
        x = batch(ranks, zero=zero, dtype=dtype)
        assert_equivariant(lambda x: encoder(x)[0].pairs(SPEC), x, draws=1, slack=500)
        assert_equivariant(lambda x: decoder(encoder(x)[0]), x, draws=1, slack=500)
        assert_invariant(lambda x: encoder(x)[1], x, draws=1, slack=500)
    with pytest.raises(AssertionError):
        assert_invariant(lambda x: encoder(x)[1], batch(ranks, dtype=dtype), off_group=True)


@torch.no_grad()
def test_shapes_padding_permutation_and_given_spectra() -> None:
    encoder, decoder = trained(torch.float64), Decoder(SPEC, DecoderConfig(d=4)).double()
    x = batch(RANKS["mixed"], zero=("v",))
    latent, features = encoder(x)
    assert latent.U.shape == latent.V.shape == (4, len(SPEC), 4, 4) and features.shape == (4, 8)
    assert not latent.joined().mT[~latent.mask()].any()
    assert torch.allclose(features, encoder(x.padded(9))[1])
    order = torch.tensor([3, 1, 0, 2])
    assert torch.allclose(features[order], encoder(x[order])[1])
    assert torch.equal(features, encoder(x, encoder.spectra(x))[1])
    y = decoder(latent)
    assert y.spec == SPEC and torch.equal(y.ranks, x.ranks)
    for group in y.groups:
        assert not group.U.mT[~y.mask(group)].any()
    # Zero LoRAs, and ones far from the training set's size, are no special case.
    zero = batch([2], zero=SPEC.names)
    assert encoder(zero)[1].isfinite().all()
    for c in (1e-8, 1e8):
        assert encoder(x.map(lambda U, V, c=c: (U * c, V)))[1].isfinite().all()


def test_features_have_gradients_to_the_factors() -> None:
    """A guide needs them, also through zero modules and padding."""
    encoder, x = trained(torch.float64), batch(RANKS["mixed"], zero=("v",))
    for g in x.groups:
        g.U.requires_grad_(True)
    encoder(x)[1].square().sum().backward()
    for g in x.groups:
        assert g.U.grad is not None and g.U.grad.isfinite().all()
    assert any(g.U.grad is not None and g.U.grad.any() for g in x.groups)


def dense(x: Batch) -> dict[str, Tensor]:
    return {n: torch.stack([lora[n].delta() for lora in x.unstack()]) for n in x.spec.names}


@torch.no_grad()
def test_start_is_the_optimal_projection() -> None:
    x = batch([2] * 12, seed=3)
    # The same in bad gauges: directions belong to delta W.
    x = gl.act_batch(x, gl.random_gauge_batch(x, condition=1e4))
    encoder = Encoder.from_batch(x, LINEAR).double()
    y = Decoder.from_encoder(encoder).double()(encoder.encode(x))
    for name, W in dense(x).items():
        left = torch.linalg.eigh(torch.einsum("nij,nkj->ik", W, W))[1][:, -3:]
        right = torch.linalg.eigh(torch.einsum("nij,nik->jk", W, W))[1][:, -3:]
        wanted = left @ left.T @ W @ right @ right.T
        assert torch.allclose(dense(y)[name], wanted, atol=1e-5 * float(W.norm())), name


@torch.no_grad()
def test_functional_directions_keep_most_of_what_the_module_sees() -> None:
    x = batch([2] * 12, seed=3)
    g = torch.Generator().manual_seed(0)
    S = {}
    for module in list(SPEC)[:3]:
        A = torch.randn(module.in_flat, module.in_flat, generator=g, dtype=torch.float64)
        A *= torch.logspace(0, -2, module.in_flat, dtype=torch.float64)
        S[module.name] = A @ A.T
    loss = {}
    for label, moments in (("plain", None), ("functional", S)):
        encoder = Encoder.from_batch(x, LINEAR, S=moments, ridge=1e-9).double()
        decoder = Decoder.from_encoder(encoder, S=moments, ridge=1e-9).double()
        y = decoder(encoder.encode(x))
        z = decoder(encoder.encode(y))
        assert metrics.relative_distance(y, z).max() < 1e-5, "a projection leaves its image alone"
        loss[label] = metrics.squared_distance(x, y, S).mean()
    assert loss["functional"] < 0.8 * loss["plain"]
    # Against dense algebra: the projection is orthogonal in the norm |dW|_S.
    difference, image = dense(x), dense(y)
    for name, moment in S.items():
        inner = torch.einsum("nij,jk,nik->n", difference[name] - image[name], moment, image[name])
        assert (
            inner.abs().max() < 1e-4 * torch.einsum("nij,jk,nik->n", image[name], moment, image[name]).max()
        )
    with pytest.raises(ShapeError, match="S of module 'q'"):
        principal_directions(x, 2, S={"q": torch.eye(5)})


@torch.no_grad()
def test_more_rows_than_directions_lose_nothing() -> None:
    """d above what the LoRAs span, and above the module's own size."""
    x = batch([1, 1], seed=3, zero=("v",))
    for P in (*principal_directions(x, 8)[0], *principal_directions(x, 8)[1]):
        rows = min(8, P.shape[-1])
        eye = torch.eye(8, dtype=torch.float64).expand(len(P), 8, 8).clone()
        eye[:, range(rows, 8), range(rows, 8)] = 0
        assert torch.allclose(P @ P.mT, eye, atol=1e-9)
    encoder = Encoder.from_batch(x, EncoderConfig(d=8, p=2, features=8, width=8, heads=2)).double()
    y = Decoder.from_encoder(encoder).double()(encoder.encode(x))
    assert metrics.relative_distance(x, y).max() < 1e-6


@pytest.mark.parametrize("n, K, exact", [(6, 40, True), (40, 6, True), (60, 50, False)])
def test_principal_directions_against_svd(
    n: int, K: int, exact: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    g = torch.Generator().manual_seed(0)
    C = torch.randn(n, K, generator=g, dtype=torch.float64) * 0.7 ** torch.arange(K)
    wanted = torch.linalg.svd(C)[0][:, :2].T
    if not exact:
        monkeypatch.setattr("lolgen.nn.directions._EXACT", 10)
    before = torch.random.get_rng_state()
    found = _principal(C, 2)
    assert torch.equal(before, torch.random.get_rng_state())
    assert torch.allclose((found @ wanted.T).abs(), torch.eye(2, dtype=torch.float64), atol=1e-8)


def test_right_inverse_is_smallest_in_its_norm() -> None:
    g = torch.Generator().manual_seed(0)
    P = torch.randn(2, 5, generator=g, dtype=torch.float64)
    A = torch.randn(5, 5, generator=g, dtype=torch.float64)
    S = A @ A.T
    W = right_inverse(P, S)
    assert torch.allclose(P @ W, torch.eye(2, dtype=torch.float64))
    null = torch.linalg.svd(P)[2][2:].T  # (5, 3)
    for _ in range(5):
        other = W + null @ torch.randn(3, 2, generator=g, dtype=torch.float64)
        assert torch.trace(other.T @ S @ other) > torch.trace(W.T @ S @ W)


@torch.no_grad()
def test_statistics_standardise_the_training_set() -> None:
    x = batch([2] * 40, seed=2, zero=("v",))
    encoder = Encoder.from_batch(x, LINEAR).double()
    encoder.fit(x)
    I = encoder.invariants(encoder.encode(x), encoder.spectra(x))  # noqa: E741
    assert I.shape == (40, len(SPEC), 2 * 2 + 3)
    assert torch.allclose(I.mean(0), torch.zeros_like(I[0]), atol=1e-6)
    products = I[..., :4]
    assert torch.allclose(products.square().mean(), torch.ones((), dtype=torch.float64))
    # Products are of delta W over its norm: the size of the LoRA is not in them.
    y = x.map(lambda U, V: (U * 7, V))
    J = encoder.invariants(encoder.encode(y), encoder.spectra(y))
    assert torch.allclose(J[..., :4], products, atol=1e-4)
    assert (J[..., 4:] - I[..., 4:]).abs().max() > 1
    # An empty training set of zeros leaves the scales at 1.
    encoder.fit(batch([2, 2], zero=SPEC.names))
    assert encoder.size == 1 and encoder.spread == 1


@torch.no_grad()
def test_spectrum_is_logarithms_of_singular_values() -> None:
    x = batch([3, 2])
    layer = Spectrum(SPEC, top=2).double()
    found = layer(gl.spectrum_batch(x))
    for n, lora in enumerate(x.unstack()):
        for m, name in enumerate(SPEC.names):
            s = torch.linalg.svdvals(lora[name].delta())
            wanted = torch.tensor([s[0], s[1], s.norm()], dtype=torch.float64)
            assert torch.allclose(found[n, m], (wanted + 1e-3).log())
    wide = layer(gl.spectrum_batch(x.padded(6)))
    assert torch.allclose(wide, found)
    assert Spectrum(SPEC, top=5).double()(gl.spectrum_batch(x)).shape == (2, len(SPEC), 6)


def test_another_spec_is_refused_naming_the_first_difference() -> None:
    encoder = Encoder(SPEC, CONFIG)
    other = Batch.stack([random_lora(OTHER_SHAPE, 2)])
    wanted = r"module 1: found 'conv' \(conv, \(5, 6\)\), wanted 'conv' \(conv, \(5, 18\)\)"
    for call in (encoder, encoder.encode, encoder.spectra):
        with pytest.raises(SpecError, match=wanted):
            call(other)
    renamed = Spec((ModuleSpec("p", 7, 6), *SPEC.modules[1:]))
    with pytest.raises(SpecError, match="module 0: found 'p'.*wanted 'q'"):
        encoder(Batch.stack([random_lora(renamed, 2)]))
    with pytest.raises(ValueError, match="even"):
        EncoderConfig(features=7)
