"""Spectral models: real tensors in and out, complex ones between, forward and backward."""

from __future__ import annotations

import pytest
import torch
from torch import fft
from torch.nn import functional as F

from lightning_sketch.errors import UnsupportedOperatorError
from lightning_sketch.jets import JetTensor
from lightning_sketch.jets.tensor import is_arranged

from .oracle import assert_right, make_curve
from .sweep import with_gradients

WINDOW = torch.hann_window(8).double()


def spectrogram(x):
    return torch.stft(x, 8, 4, window=WINDOW, return_complex=True)


def spectral_convolution(x, weight):
    """The lowest frequencies only, written into zeros."""
    spectrum = fft.rfft(x)
    kept = torch.zeros_like(spectrum)
    kept[:, :2] = torch.einsum("bi,io->bo", spectrum[:, :2], torch.view_as_complex(weight))
    return fft.irfft(kept, n=6)


def squeezed(x):
    """Parts of complex numbers that lie apart in memory, and a view that is written into."""
    y = x.movedim(0, -1).view(2, 3, 2) if x.shape[0] == 2 else x
    z = torch.view_as_complex(y.contiguous())
    parts = torch.view_as_real(z)
    z.mul_(1 + 2j)
    return parts


CASES = {
    "Fourier mixing": (lambda x: fft.fft(fft.fft(x, dim=-1), dim=-2).real, [(2, 4, 6)]),
    "filter": (lambda x, w: fft.irfft(fft.rfft(x) * w, n=8), [(3, 8), (3, 5)]),
    "other lengths": (lambda x: fft.irfft(fft.rfft(x, n=10), n=7), [(3, 8)]),
    "spectral convolution": (spectral_convolution, [(2, 6), (2, 2, 2)]),
    "long convolution": (
        lambda x, k: fft.irfft(fft.rfft(x, n=16) * fft.rfft(k, n=16), n=16)[..., :8],
        [(2, 8), (8,)],
    ),
    "correlation": (lambda x, y: fft.irfft(fft.rfft(x) * fft.rfft(y).conj(), n=6), [(2, 6), (2, 6)]),
    "deconvolution": (lambda x, y: fft.irfft(fft.rfft(x) / (3 + fft.rfft(y)), n=6), [(2, 6), (2, 6)]),
    "amplitudes": (lambda x: fft.rfft2(x).abs(), [(2, 4, 5)]),
    "phases": (lambda x: fft.fft(x).angle()[..., 1:3], [(2, 5)]),
    "power": (lambda x: fft.rfft(x, norm="ortho").abs() ** 2, [(2, 6)]),
    "spectrogram loss": (
        lambda x, y: F.l1_loss((spectrogram(x) + 6).abs(), spectrogram(y).abs() ** 2 + 99),
        [(2, 16), (2, 16)],
    ),
    "there and back": (lambda x: torch.istft(spectrogram(x) * 0.5, 8, 4, window=WINDOW), [(2, 32)]),
    "Hermitian": (lambda x: fft.hfft(fft.ihfft(x)), [(6,)]),
    "shifted": (lambda x: fft.fftshift(fft.fft2(x)).imag, [(4, 4)]),
    "parts": (lambda x, a, b: fft.irfft(fft.rfft(x) * torch.complex(a, b), n=6), [(2, 6), (4,), (4,)]),
    "polar": (lambda r, a: fft.irfft(torch.polar(r, a), n=4), [(3,), (3,)]),
    "complex constants": (lambda x: ((x + torch.tensor(1j)) * (x - 2j) * 1j).real, [(6,)]),
    "in place": (lambda x: fft.rfft(x).mul_(2).add_(1).abs(), [(2, 6)]),
    "written through a view": (squeezed, [(2, 2, 3)]),
}


@pytest.mark.parametrize("parts", [1, 2], ids=["real", "complex"])
@pytest.mark.parametrize("name", CASES)
def test_spectral(name, parts):
    """Oracle: polynomials fitted to plain torch and its autograd."""
    function, shapes = CASES[name]
    generator = torch.Generator().manual_seed(2)
    points = [torch.randn(s, generator=generator, dtype=torch.float64) for s in shapes]
    curves = [make_curve(p, 3, parts, 3 - parts, generator) for p in points]
    run = with_gradients(lambda xs: [function(*xs)], [name != "written through a view"] * len(points), [])
    assert_right(run, curves, tolerance=1e-5)


def jet(*shape: int) -> JetTensor:
    generator = torch.Generator().manual_seed(0)
    return make_curve(torch.randn(shape, generator=generator).double(), 2, 2, 2, generator).jet()


@pytest.mark.parametrize(("compute", "name"), [
    (lambda x: fft.fft(x).exp(), r"aten\.exp\.default"),
    (lambda x: fft.fft(x).sqrt(), r"aten\.sqrt\.default"),
    (lambda x: fft.fft(x) ** 3, r"aten\.pow\.Tensor_Scalar"),
    (lambda x: fft.fft(x).tanh_(), r"aten\.tanh\.default"),
    (lambda x: torch.vdot(fft.fft(x), fft.fft(x)), r"aten\.vdot\.default"),
    (lambda x: fft.fft(x).prod(), r"aten\.prod\.default"),
    (lambda x: torch.linalg.inv(torch.view_as_complex(x.view(2, 2, 1).expand(2, 2, 2).contiguous())), "linalg_inv"),
    (lambda x: torch.eye(4, dtype=torch.complex128) @ fft.fft(x) + torch.log(x * 1j), r"aten\.log\.default"),
])  # fmt: skip
def test_other_complex_operators_are_refused(compute, name):
    """Oracle: the sentence itself."""
    with pytest.raises(UnsupportedOperatorError, match=rf"{name}.*no jet rule for complex.*real and imaginary parts"):
        compute(jet(4))


def reordered(x: JetTensor) -> JetTensor:
    """The same jet, with the directions innermost in memory."""
    n = x.ndim
    inner = x.coefficients.permute(*range(3, n + 3), 0, 1, 2).contiguous()
    return JetTensor(x.primal, inner.permute(n, n + 1, n + 2, *range(n)))


@pytest.mark.parametrize(("shape", "function"), [
    ((2, 3, 2), torch.view_as_complex),
    ((2, 3, 2), lambda x: fft.fftn(x, dim=(0, 1))),
    ((3, 1), lambda x: fft.fft(x, dim=1)),
    ((2, 1), lambda x: fft.fft(x, dim=1) * fft.fft(x, dim=1).conj()),
])  # fmt: skip
def test_directions_in_another_memory_order(shape, function):
    """Oracle: the same jets in the usual order; the two parts of a complex number must lie side by side."""
    usual = jet(*shape)
    other = reordered(usual)
    assert other.coefficients.stride(0) < other.coefficients.stride(3)
    found, expected = function(other), function(usual)
    torch.testing.assert_close(torch.view_as_real(found).coefficients, torch.view_as_real(expected).coefficients)
    aliases = torch.view_as_real(found)
    found.mul_(2)
    torch.testing.assert_close(aliases.coefficients, 2 * torch.view_as_real(expected).coefficients)
    assert is_arranged(aliases.coefficients, aliases.primal)


def test_empty():
    """Oracle: the shapes."""
    a, b = jet(0, 1, 3).requires_grad_(), jet(0, 10, 3).requires_grad_()
    y = torch.complex(a, b)
    assert y.shape == (0, 10, 3)
    assert [g.shape for g in torch.autograd.grad(torch.view_as_real(y).square().sum(), [a, b])] == [a.shape, b.shape]
