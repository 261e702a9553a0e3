"""Noise that is added to images step by step, and taken away again towards a given image.

Times are 0 (an image) to T (noise). With a_t the share of the image's variance that is left at t:

| paper | here | meaning |
| --- | --- | --- |
| alpha_t | shares[t] | a_t, the product of 1 - beta over the first t steps; shares[0] is 1 |
| x_t | noisy | sqrt(a_t) x_0 + sqrt(1 - a_t) noise |
| y | target | the image that is to be rebuilt |
| eps_theta | noise | what the network finds in x_t |
| w | weight | of the conditioning |

Source: "Denoising Diffusion Implicit Models" (Song et al., ICLR 2021), equation 12, for the step;
DDAD, equations 7 to 9, for the condition.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

FIRST_BETA, LAST_BETA = 1e-4, 0.02
"""Of the linear schedule (paper)."""


def shares_of_image(steps: int) -> Tensor:
    """Return a_t for t = 0 to T, (T + 1,), float32."""
    betas = torch.linspace(FIRST_BETA, LAST_BETA, steps, dtype=torch.float64)
    return torch.cat([torch.ones(1), (1 - betas).cumprod(dim=0)]).float()


@dataclass(frozen=True)
class Plan:
    """Which times an image goes through.

    Attributes:
        noised_to: time to which noise is added.
        times: those at which the network looks, descending; the last step ends at 0.
    """

    noised_to: int
    times: tuple[int, ...]

    @property
    def steps(self) -> list[tuple[int, int]]:
        """Each time and the one that follows."""
        return list(zip(self.times, [*self.times[1:], 0], strict=True))


def plan(start: int, step: int, *, released: bool) -> Plan:
    """Return the times from `start` down, `step` apart.

    Args:
        start: time to which noise is added.
        step: at most as much.
        released: as the released code counts them: noise is added to start + 1, and the network
            looks at start - step + 1 and so on, down to 1.
    """
    if released:
        return Plan(start + 1, tuple(time + 1 for time in reversed(range(0, start, step))))
    return Plan(start, tuple(range(start, 0, -step)))


def noised(images: Tensor, noise: Tensor, share: Tensor) -> Tensor:
    """Return x_t of images (B, 3, S, S) with noise that broadcasts, for shares that broadcast."""
    return share.sqrt() * images + (1 - share).sqrt() * noise


def conditioned(
    noise: Tensor, noisy: Tensor, target: Tensor, share: Tensor, weight: float
) -> Tensor:
    """Return the noise moved so that the step goes towards the target, equations 7 and 8.

    The target is given the same noise, y_t, and the noise is moved by
    -weight * sqrt(1 - a_t) (y_t - x_t).
    """
    difference = noised(target, noise, share) - noisy
    return noise - weight * (1 - share).sqrt() * difference


def ddim_step(
    noisy: Tensor, noise: Tensor, share: Tensor, next_share: Tensor, fresh: Tensor, eta: float
) -> Tensor:
    """Return the images at the next time.

    Args:
        noisy: x_t, (B, 3, S, S).
        noise: in it.
        share: a_t.
        next_share: a of the next time, larger.
        fresh: noise that broadcasts; it has no effect with eta 0 or at the last step.
        eta: 0 for a deterministic step, 1 for as much fresh noise as DDPM has.
    """
    image = (noisy - (1 - share).sqrt() * noise) / share.sqrt()
    variance = (1 - next_share) / (1 - share) * (1 - share / next_share)
    deviation = eta * variance.sqrt()
    kept = (1 - next_share - deviation.square()).clamp_min(0).sqrt()
    return next_share.sqrt() * image + kept * noise + deviation * fresh


def rebuild(
    find_noise: Callable[[Tensor, Tensor], Tensor],
    start: Tensor,
    target: Tensor,
    noise: Tensor,
    *,
    shares: Tensor,
    times: Plan,
    weight: float,
    eta: float,
) -> Tensor:
    """Return images that have been noised and denoised towards a target, (B, 3, S, S) in -1 to 1.

    Args:
        find_noise: the network: x_t and its time (1,) to the noise.
        start: images that are noised, (B, 3, S, S) in -1 to 1; to score, the target itself.
        target: (B, 3, S, S).
        noise: first that of the start, then that of each step but the last: (K, 3, S, S), or
            (K, B, 3, S, S) where each image has its own; with eta 0 only the first is needed.
        shares: a_t, (T + 1,).
        times: which steps are taken.
        weight: of the condition.
        eta: see `ddim_step`.
    """
    noisy = noised(start, noise[0], shares[times.noised_to])
    for index, (time, following) in enumerate(times.steps, start=1):
        found = find_noise(noisy, torch.full((1,), float(time), device=noisy.device))
        found = conditioned(found, noisy, target, shares[time], weight)
        fresh = noise[index] if index < len(noise) else torch.zeros_like(noise[0])
        noisy = ddim_step(noisy, found, shares[time], shares[following], fresh, eta)
    return noisy.clamp(-1, 1)
