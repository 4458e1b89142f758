"""The VAE against ordinary layers, its clip and its divergence."""

from __future__ import annotations

import pytest
import torch
from torch.distributions import Normal, kl_divergence

from saferl.nn import VAE
from saferl.rng import MemberRandom

SEEDS, OBS, A, B = (0, 1, 2), 3, 2, 5


def rows(width: int, seed: int) -> torch.Tensor:
    random = torch.Generator().manual_seed(seed)
    return torch.randn(len(SEEDS), B, width, generator=random, dtype=torch.float64)


@pytest.mark.parametrize("latent", [None, 1])
def test_each_member_is_a_chain_of_linear_layers(latent):
    vae = VAE(MemberRandom(SEEDS), OBS, A, (8, 7), latent).double()
    width = latent or 2 * A
    s, a, noise = rows(OBS, 0), rows(A, 1).tanh(), rows(width, 2)
    decoded, mean, log_std = vae(s, a, noise)

    def perceptron(mlp, m, x):
        for i, (weight, bias) in enumerate(zip(mlp.weights, mlp.biases)):
            x = (x.relu() if i else x) @ weight[m, 0] + bias[m, 0]
        return x

    for m in range(len(SEEDS)):
        both = perceptron(vae.encoder, m, torch.cat((s[m], a[m]), -1))
        torch.testing.assert_close(mean[m], both[:, :width])
        torch.testing.assert_close(log_std[m], both[:, width:])
        z = mean[m] + log_std[m].exp() * noise[m]
        expected = perceptron(vae.decoder, m, torch.cat((s[m], z), -1)).tanh()
        torch.testing.assert_close(decoded[m], expected)


def test_log_std_is_clipped():
    vae = VAE(MemberRandom(SEEDS), OBS, A, (8,)).double()
    for bias, clipped in ((-100.0, -4.0), (100.0, 15.0)):
        with torch.no_grad():
            vae.encoder.biases[-1].fill_(bias)
        mean, log_std = vae.encode(rows(OBS, 0), rows(A, 1))
        assert (log_std == clipped).all()
        assert ((mean - bias).abs() < 10).all()  # the mean is not


def test_divergence_is_that_of_torch():
    mean, log_std = rows(4, 0), rows(4, 1)
    expected = kl_divergence(Normal(mean, log_std.exp()), Normal(0.0, 1.0))
    torch.testing.assert_close(VAE.divergence(mean, log_std), expected)
    zero = torch.zeros(1)
    assert VAE.divergence(zero, zero).item() == 0


def test_gradient_reaches_actions_through_encoder_and_decoder():
    vae = VAE(MemberRandom(SEEDS), OBS, A, (8, 8)).double().requires_grad_(False)
    s, a, noise = rows(OBS, 0), rows(A, 1).requires_grad_(), rows(2 * A, 2)
    assert torch.autograd.gradcheck(lambda x: vae(s, x, noise)[0], (a,))
    gradient = torch.autograd.grad(vae(s, a, noise)[0].sum(), a)[0]
    assert (gradient != 0).any(-1).all()
