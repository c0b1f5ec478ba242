"""The bound by t against closed forms; strata cover every step once; the standard error is right."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import road
import tiny
import torch
from oracles import PREDICTIONS, SCHEDULES, Mixture, gaussian, generator
from torch import Tensor
from torch.distributions import Normal, kl_divergence

from ldm.cli.main import main
from ldm.data.dataset import read_captioned
from ldm.diffusion import likelihood
from ldm.diffusion.parameterization import Prediction
from ldm.diffusion.reverse import Denoiser
from ldm.diffusion.schedule import NoiseSchedule
from ldm.evaluation.metrics.nll import NLL, nll, nll_of_pipeline, strata
from ldm.models.conditioning import Conditioning
from ldm.models.text_encoder import TextEncoder
from ldm.models.vae import encode

SHORT = NoiseSchedule.linear(60, 1e-3, 0.3)
DATA = gaussian([0.7, -0.3], [0.5, 0.9])


def closed_form(data: Mixture, schedule: NoiseSchedule) -> tuple[float, Tensor]:
    """For one Gaussian of independent dimensions and its exact denoiser: L_T, and L_t for all t [T], nats/dim.

    L_t = c**2 MMSE_t / (2 v) with v = beta_tilde and c the factor of x0 in the posterior mean; L_0 is the decoder's.
    """
    mean, var = data.means[0], data.covs[0].diagonal()
    bar, beta = schedule.alpha_bar[:, None], schedule.betas[:, None]
    before = torch.cat([torch.ones(1, 1, dtype=torch.float64), bar])[:-1]
    mmse = var * (1 - bar) / (bar * var + 1 - bar)  # (T, d)
    v = beta * (1 - before) / (1 - bar)
    v[0] = v[1]
    terms = (before.sqrt() * beta / (1 - bar)) ** 2 * mmse / (2 * v)
    terms[0] = 0.5 * (torch.log(2 * math.pi * v[0]) + mmse[0] / v[0])
    end = bar[-1]
    second_moment = Normal(torch.zeros_like(mean), (1 - end).sqrt().expand_as(mean))
    prior = kl_divergence(second_moment, Normal(torch.zeros_like(mean), torch.ones_like(mean)))
    prior = prior + end * (mean**2 + var) / 2
    return float(prior.mean()), terms.mean(1)


def estimate(
    schedule: NoiseSchedule, n: int, most_strata: int, seed: int, prediction: Prediction = "v", data: Mixture = DATA
) -> NLL:
    rng = generator(seed)
    network = data.network(schedule, prediction)
    return nll(
        lambda x_t, t, _: network(x_t, t), schedule, prediction, data.sample(n, rng), Conditioning(),
        generator=rng, most_strata=most_strata, batch_size=999, progress=False,
    )  # fmt: skip


@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_every_term_is_its_closed_form(prediction: Prediction) -> None:
    """With all steps evaluated, each term is within its standard errors, and so is their sum."""
    prior, terms = closed_form(DATA, SHORT)
    found = estimate(SHORT, 3000, 60, 1, prediction)
    assert [(term.first, term.last) for term in found.terms] == [(t, t) for t in range(60)]
    for term, exact in zip(found.terms, terms.tolist(), strict=True):
        assert abs(term.nats_per_dim - exact) < 4.5 * term.standard_error + 1e-9
    assert found.prior == pytest.approx(prior, rel=0.1)
    assert abs(found.nats_per_dim - prior - float(terms.sum())) < 4 * found.standard_error
    entropy = float(0.5 * (2 * math.pi * math.e * DATA.covs[0].diagonal()).log().mean())
    assert found.nats_per_dim > entropy - 4 * found.standard_error


@pytest.mark.parametrize("most", [1, 3, 8])
def test_a_subset_of_steps_is_unbiased(most: int) -> None:
    """With few strata the mean is that of all steps, stratum by stratum, within the reported standard errors."""
    prior, terms = closed_form(DATA, SHORT)
    found = estimate(SHORT, 20_000, most, 2)
    assert found.network_calls <= most + 1
    assert abs(found.nats_per_dim - prior - float(terms.sum())) < 4 * found.standard_error
    assert found.standard_error < 0.03 * float(terms.sum() + prior)
    for term in found.terms:
        exact = float(terms[term.first : term.last + 1].sum())
        assert abs(term.nats_per_dim - exact) < 4 * term.standard_error


def test_the_standard_error_is_the_error() -> None:
    estimates = [estimate(SHORT, 150, 4, seed) for seed in range(60)]
    spread = float(torch.tensor([found.nats_per_dim for found in estimates]).std())
    reported = sum(found.standard_error for found in estimates) / len(estimates)
    assert 0.7 < reported / spread < 1.4


@pytest.mark.parametrize("name", SCHEDULES)
@pytest.mark.parametrize("most", [1, 7, 50, 998, 999, 5000])
def test_strata_hold_every_step_once(name: str, most: int) -> None:
    runs = strata(SCHEDULES[name], most)
    assert [t for run in runs for t in run] == list(range(1, 1000))
    assert len(runs) <= most


def test_more_strata_vary_less() -> None:
    few, many = (estimate(NoiseSchedule.scaled_linear(), 400, most, 3) for most in (2, 40))
    assert many.standard_error < 0.7 * few.standard_error


def test_the_whole_chain_agrees_with_elbo() -> None:
    """All steps, against the ELBO of ldm.diffusion.likelihood with other noise."""
    rng = generator(5)
    x0 = DATA.sample(3000, rng)
    denoiser = Denoiser(DATA.network(SHORT, "eps"), SHORT, "eps")
    chain = likelihood.nats_per_dim(likelihood.elbo(denoiser, x0, generator=rng).total, x0)
    found = nll(
        lambda x, t, _: denoiser.network(x, t), SHORT, "eps", x0, Conditioning(), generator=rng, most_strata=60,
        progress=False,
    )  # fmt: skip
    assert abs(found.nats_per_dim - float(chain.mean())) < 4 * 2**0.5 * found.standard_error


def test_one_picture_is_refused() -> None:
    with pytest.raises(ValueError, match="at least two pictures, got 1"):
        estimate(SHORT, 1, 5, 0)


def test_a_pipelines_bound_is_that_of_its_parts(tmp_path: Path) -> None:
    """Schedule and prediction come from the scheduler, each picture has its caption, and the seed fixes the number."""
    schedule = NoiseSchedule.cosine(200)
    pipeline = tiny.pipeline(tmp_path / "encoder", schedule=schedule, prediction="v")
    pictures = read_captioned(road.draw_folder(tmp_path / "data"), progress=False)
    found = nll_of_pipeline(pipeline, pictures, most_strata=6, batch_size=24, seed=3, progress=False)
    rng = torch.Generator().manual_seed(3)
    pixels = torch.stack([torch.tensor(list(row.image().getdata())).reshape(16, 16, 3) for row in pictures])
    posterior = encode(pipeline.vae, pixels.permute(0, 3, 1, 2) / 127.5 - 1)
    x0 = posterior.sample(torch.randn(posterior.mean.shape, generator=rng))
    context = TextEncoder(pipeline.tokenizer, pipeline.text_encoder).encode([row.captions[0] for row in pictures])
    again = nll(
        lambda x_t, t, c: pipeline.unet(x_t, t, c.context).sample, schedule, "v", x0, Conditioning(context),
        generator=rng, most_strata=6, progress=False,
    )  # fmt: skip
    assert found.nats_per_dim == pytest.approx(again.nats_per_dim, rel=1e-4)
    assert (found.timesteps, found.pictures, found.dimensions) == (200, 24, 256)


def test_the_command_writes_a_table_and_json(
    tiny_pipeline_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data, out = road.draw_folder(tmp_path / "data"), tmp_path / "new"
    words = ["evaluate", str(tiny_pipeline_folder), "--data", str(data), "--nll"]
    main([*words, "--strata", "3", "--holdout", "0.5", "--out", str(out)])
    printed, written = capsys.readouterr().out, json.loads((out / "nll.json").read_text("utf-8"))
    assert f"NLL {written['nats_per_dim']:.4f} ± {written['standard_error']:.4f} nats/dim of latents" in printed
    assert "not of pixels" in printed and "not of pixels" in written["meaning"]
    parts = sum(term["nats_per_dim"] for term in written["terms"]) + written["prior"]
    assert parts == pytest.approx(written["nats_per_dim"])
    assert written["pictures"] == len(read_captioned(data, holdout=0.5, progress=False).heldout)


def test_models_of_few_steps_and_of_second_pictures_are_refused(tmp_path: Path) -> None:
    few, pictures = tiny.pipeline(tmp_path), read_captioned(road.draw_folder(tmp_path / "data"), progress=False)
    few.scheduler.register_to_config(solver_order=1)
    for pipeline in (few, tiny.student_pipeline(tmp_path)):
        with pytest.raises(ValueError, match="nll: this model knows a few steps alone"):
            nll_of_pipeline(pipeline, pictures)
    with pytest.raises(ValueError, match="nll: this model takes a conditioning picture"):
        nll_of_pipeline(tiny.condition_pipeline(tmp_path), pictures)
