"""The mathematics of diffusion on plain tensors.

Imports torch alone: no files, no networks, no choice of device, no hidden randomness
(every random draw takes a `torch.Generator` or comes in as an argument).

Throughout, `x_t = alpha_t * x0 + sigma_t * eps` with `alpha_t**2 + sigma_t**2 = 1`, so the
`alphas_cumprod` of diffusers and the alpha-bar of Ho et al. (2020) is `alpha_t**2`; `t` counts
from 0, and larger `t` is noisier; -1 stands for the clean sample.

Read it in this order, beside docs/theory.md:

    schedule     how much noise there is at t
    forward      q(x_t | x_{t-1}), q(x_t | x0)
    parameterization  eps, x0, v, score: one answer, four ways to say it
    reverse      Denoiser; q(x_s | x_t, x0), p(x_s | x_t) and its variance; ancestral sampling
    likelihood   the bound on -log p(x0), term by term
    losses       what to minimize, with which weights
    timesteps    which t to minimize it at
    guidance     two predictions in, one out
    distillation  what a guided sampler takes dozens of steps for, in a few
    samplers     Langevin dynamics, the probability-flow ODE, its likelihood
"""
