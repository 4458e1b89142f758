"""Encoders of pixels equal ordinary convolutions, member by member."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from saferl.errors import SaferlError
from saferl.nn import (
    DeterministicActor,
    Encoder,
    PixelActor,
    PixelCritic,
    QEnsemble,
    Trunk,
    random_shift,
)
from saferl.rng import MemberRandom

M, B = 3, 5
IMAGE = (9, 20, 24)


def images(*shape: int, seed: int = 0) -> torch.Tensor:
    random = torch.Generator().manual_seed(seed)
    return torch.randint(256, shape, generator=random, dtype=torch.uint8)


def encoder(members=range(M), image=IMAGE, **options) -> Encoder:
    layers = {"channels": (4, 6), "strides": (2, 1)} | options
    made = Encoder(MemberRandom(members), image, **layers)
    with torch.no_grad():
        for i, bias in enumerate(made.biases):  # which begin at 0
            random = torch.Generator().manual_seed(i)
            bias.add_(0.1 * torch.randn(M, bias.shape[1], generator=random)[: len(bias)])
    return made


def plain(one: Encoder, m: int, x: torch.Tensor) -> torch.Tensor:
    x = x.float() / 255 - 0.5
    for weight, bias, stride in zip(one.weights, one.biases, one.strides):
        x = F.relu(F.conv2d(x, weight[m], bias[m], stride=stride))
    return x.flatten(1)


def test_members_are_convolutions_of_their_own():
    one, x = encoder(), images(M, B, *IMAGE)
    got = one(x)
    assert got.shape == (M, B, one.size)
    weights = torch.randn(got.shape, generator=torch.Generator().manual_seed(3))
    gradients = torch.autograd.grad((got * weights).sum(), [*one.parameters()])
    for m in range(M):
        expected = plain(one, m, x[m])
        torch.testing.assert_close(got[m], expected)
        wanted = torch.autograd.grad((expected * weights[m]).sum(), [*one.parameters()])
        for g, w in zip(gradients, wanted):
            torch.testing.assert_close(g[m], w[m], rtol=1e-4, atol=1e-4)
    # A member alone: the same weights from its seed, the same features.
    alone = Encoder(MemberRandom([1]), IMAGE, (4, 6), (2, 1))
    for mine, theirs in zip(alone.weights, one.weights):
        assert torch.equal(mine[0], theirs[1])
    # The rows, flattened as a policy gets them, and channels last.
    torch.testing.assert_close(one(x.flatten(2).float()), got)
    last = Encoder(MemberRandom(range(M)), (20, 24, 9), (4, 6), (2, 1))
    last.load_state_dict(one.state_dict())
    torch.testing.assert_close(last(x.movedim(2, -1)), got)


@pytest.mark.parametrize(
    ("size", "channels", "strides", "features"),
    [
        (84, (32, 32, 32, 32), (2, 1, 1, 1), 39_200),  # DrQ-v2
        (64, (32, 64, 128, 256), (2, 2, 2, 2), 2_304),  # RLPD
    ],
)
def test_published_encoders(size, channels, strides, features):
    one = Encoder(MemberRandom([0]), (9, size, size), channels, strides)
    assert one.size == features
    assert one(images(1, 2, 9, size, size)).shape == (1, 2, features)
    first = one.weights[0][0].flatten(1)  # orthogonal rows of norm √2
    torch.testing.assert_close(first @ first.T, 2 * torch.eye(channels[0]), atol=1e-5, rtol=0)
    assert not one.biases[0].any()


def test_layers_must_fit():
    with pytest.raises(SaferlError, match="too small"):
        Encoder(MemberRandom([0]), (3, 6, 9), (4, 4, 4), (2, 1, 1))
    with pytest.raises(SaferlError, match="one per layer"):
        Encoder(MemberRandom([0]), (3, 6, 9), (4, 4), (2,))


def test_trunk_is_linear_norm_tanh_with_a_scale_for_each_member():
    trunk = Trunk(MemberRandom(range(M)), 7, 4)
    with torch.no_grad():
        trunk.scale.copy_(torch.rand(M, 1, 4) + 0.5)
        trunk.offset.copy_(torch.rand(M, 1, 4))
    x = torch.randn(M, B, 7)
    got = trunk(x)
    for m in range(M):
        y = F.linear(x[m], trunk.linear.weights[0][m, 0].T, trunk.linear.biases[0][m, 0, 0])
        expected = F.layer_norm(y, (4,), trunk.scale[m, 0], trunk.offset[m, 0]).tanh()
        torch.testing.assert_close(got[m], expected)


def test_a_shift_is_a_crop_of_the_padded_image():
    pad, x = 3, images(M, B, 3, 10, 12)
    offsets = torch.randint(2 * pad + 1, (M, B, 2), generator=torch.Generator().manual_seed(1))
    offsets[0, 0], offsets[0, 1], offsets[0, 2] = 0, 2 * pad, pad
    moved = random_shift(x, offsets, pad)
    assert moved.dtype == torch.uint8 and torch.equal(moved[0, 2], x[0, 2])
    for m in range(M):
        for b in range(B):
            padded = F.pad(x[m, b][None].float(), (pad,) * 4, mode="replicate")[0]
            i, j = offsets[m, b].tolist()
            assert torch.equal(moved[m, b].float(), padded[:, i : i + 10, j : j + 12])


def test_actor_and_critic_on_pixels():
    one, init = encoder(), MemberRandom(range(M), stream=1)
    actor = PixelActor(one, Trunk(init, one.size, 5), DeterministicActor(init, 5, 2, (8,)))
    critic = PixelCritic(Trunk(init, one.size, 5), QEnsemble(init, 5, 2, (8,), 2))
    x = images(M, B, *IMAGE)
    features = one(x)
    torch.testing.assert_close(actor.mode(x), actor(features))
    actions = actor(features.detach())
    q = critic(features.detach(), actions, frozen=True)
    torch.testing.assert_close(q, critic(features, actions))
    trunk = critic.trunk.scale
    assert torch.autograd.grad(q.sum(), [trunk], allow_unused=True) == (None,)
    q = critic(features.detach(), actor(features.detach()), frozen=True)
    reached = torch.autograd.grad(q.sum(), [*actor.parameters()], allow_unused=True)
    moved = [gradient is not None for gradient in reached]
    assert moved == [False] * 4 + [True] * 8  # the encoder is not the actor's to move
