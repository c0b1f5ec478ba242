"""Planted faults: each is one small change of one line of the mathematics, and a test of the suite that notices it.

The fault is made in the text of the real function, which is compiled again and put in its place for the length of
the test. The check is a test of the suite itself, not a copy: it passes before the change, and fails after it.
"""

from __future__ import annotations

import functools
import gc
import importlib
import inspect
import sys
import textwrap
from collections.abc import Callable
from functools import cached_property
from typing import Any, NamedTuple

import pytest
import test_distillation
import test_forward
import test_guidance
import test_likelihood
import test_losses
import test_nll
import test_parameterization
import test_randomness
import test_reverse
import test_samplers
import test_schedule
import test_timesteps
from oracles import plane

from ldm.diffusion.schedule import NoiseSchedule


class Fault(NamedTuple):
    story: str
    where: str  # module of ldm.diffusion, or room/module of ldm, and function
    old: str
    new: str
    check: Callable[..., None]
    arguments: tuple[Any, ...] = ()


FAULTS = [
    # distillation
    Fault("c_skip and c_out swapped", "distillation.consistency", "c_skip * x_t + c_out", "c_out * x_t + c_skip",
          test_distillation.test_f_is_what_stock_s_scheduler_shows, ("v",)),
    Fault("boundary in timesteps, not tenths", "distillation.boundary_scalings", "* TIMESTEP_SCALING", "",
          test_distillation.test_f_is_what_stock_s_scheduler_shows, ("x0",)),
    Fault("the solver stays at its noise level", "distillation.ddim_step", "there[1]", "here[1]",
          test_distillation.test_the_solver_s_step_is_stock_s, ("eps",)),
    Fault("pairs end one stride too early", "distillation.solver_pairs", "(t - stride)", "(t - 2 * stride)",
          test_distillation.test_pairs_are_stock_s_timesteps_and_what_is_left_is_uniform),
    Fault("the target learns, too", "distillation.consistency_loss", "with torch.no_grad():", "if True:",
          test_distillation.test_only_the_student_gets_a_gradient),
    Fault("half the timesteps are never learned", "timesteps.among", "len(table))", "len(table) // 2)",
          test_timesteps.test_only_the_steps_that_are_used_are_learned),
    # the forward process
    Fault("t off by one", "schedule.gather", "table[t]", "table[(t - 1).clamp(min=0)]",
          test_forward.test_each_sample_has_its_own_t),
    Fault("alpha for alpha-bar", "schedule.NoiseSchedule.alpha_bar", ".cumprod(0)", "",
          test_schedule.test_tables_follow_from_the_betas, ("linear",)),
    Fault("missing sqrt of alpha-bar", "schedule.NoiseSchedule.alpha", ".sqrt()", "",
          test_schedule.test_tables_follow_from_the_betas, ("cosine",)),
    Fault("cosine without its offset", "schedule.NoiseSchedule.cosine", "(u + s) / (1 + s)", "u",
          test_schedule.test_published_constants),
    Fault("zero SNR shifted, not scaled", "schedule.NoiseSchedule.rescale_zero_terminal_snr",
          "* root[0] / (root[0] - root[-1])", "",
          test_schedule.test_zero_terminal_snr_is_that_of_diffusers_in_float64, ("linear",)),
    Fault("missing sqrt in a step", "forward.q_step", "(1 - beta).sqrt()", "(1 - beta)",
          test_forward.test_steps_compose_to_the_marginal, ("linear",)),
    Fault("variance for deviation", "forward.q_sample", "sigma * eps", "sigma**2 * eps",
          test_forward.test_chain_and_shortcut_draw_the_noised_data),
    # predictions
    Fault("v with the wrong sign", "parameterization.v_from", "alpha * eps - sigma * x0", "sigma * x0 - alpha * eps",
          test_parameterization.test_v_is_that_of_diffusers),
    Fault("x0 and eps of v exchanged", "parameterization.target", "v_from(x0, eps,", "v_from(eps, x0,",
          test_parameterization.test_a_target_gives_back_the_pair),
    Fault("x0 of v by the other angle", "parameterization.x0_from_v", "- sigma * v", "+ sigma * v",
          test_parameterization.test_a_target_gives_back_the_pair),
    Fault("score without sigma", "parameterization.score_from_eps", "-eps / sigma", "-eps",
          test_parameterization.test_the_exact_network_gives_the_posterior_mean_and_the_score, (plane(), "eps")),
    Fault("score with the wrong sign", "parameterization.score_from_eps", "-eps", "eps",
          test_parameterization.test_the_exact_network_gives_the_posterior_mean_and_the_score, (plane(), "v")),
    Fault("mean not turned back", "reverse.x0_from_mean",
          "/ c.x0_factor.to(x_t)", "* c.x0_factor.to(x_t)",
          test_parameterization.test_every_form_gives_every_other, ("mean", "x0", "linear")),
    # the reverse process
    Fault("posterior coefficients swapped", "reverse.posterior",
          "c.x0_factor.to(x_t) * x0 + c.x_t_factor.to(x_t) * x_t",
          "c.x_t_factor.to(x_t) * x0 + c.x0_factor.to(x_t) * x_t",
          test_reverse.test_posterior_of_neighbors_is_the_textbook),
    Fault("beta for beta-tilde", "reverse.bridge", "beta_tilde=beta * sigma2_s / sigma2_t", "beta_tilde=beta",
          test_reverse.test_posterior_marginalizes_to_the_forward_process),
    Fault("alpha-bar of the wrong end", "reverse.bridge", "alpha_bar_s.sqrt() * beta", "alpha_bar_t.sqrt() * beta",
          test_reverse.test_posterior_is_the_conditional_of_the_joint_gaussian, ("linear", (700, 300))),
    Fault("variance interpolated without logs", "reverse.log_variance", "weight * upper + (1 - weight) * lower",
          "(weight * upper.exp() + (1 - weight) * lower.exp()).log()",
          test_reverse.test_learned_variance_runs_from_beta_tilde_to_beta_on_a_log_scale),
    Fault("variance fraction not brought to [0, 1]", "reverse.log_variance", "(fraction + 1) / 2", "fraction",
          test_reverse.test_ancestral_step_is_that_of_diffusers, ("eps", ("learned", "learned_range"), (500, 1000))),
    Fault("variance channels first", "reverse.Denoiser.split",
          "return prediction, fraction", "return fraction, prediction",
          test_reverse.test_optimal_variance_is_that_of_the_data, (500,)),
    Fault("noise by variance, not deviation", "reverse.ancestral_step", "(0.5 * log_var).exp()", "log_var.exp()",
          test_reverse.test_ancestral_sampling_converges_with_order_one, ("beta",)),
    Fault("noise on the clean sample", "reverse.ancestral_step", "torch.where(clean,", "torch.where(clean & False,",
          test_reverse.test_the_clean_sample_gets_no_noise, (0,)),
    # objectives
    Fault("min-SNR applied twice", "losses.loss_weight",
          "weighting(snr) / factor", "(weighting(snr) / factor) ** 2",
          test_losses.test_a_weighting_is_one_loss_for_every_prediction, ("min_snr", "linear")),
    Fault("min-SNR of v like that of eps", "losses.loss_weight", '"v": snr + 1', '"v": snr',
          test_losses.test_weights_are_those_of_the_papers),
    Fault("min-SNR from below", "losses.min_snr", "clamp(max=gamma)", "clamp(min=gamma)",
          test_losses.test_weights_are_those_of_the_papers),
    Fault("SNR truncated from above", "losses.truncated_snr", "clamp(min=1.0)", "clamp(max=1.0)",
          test_losses.test_weights_are_those_of_the_papers),
    Fault("trained towards x0, called eps", "losses.diffusion_loss",
          "target(prediction, x0, eps,", "target(prediction, eps, x0,",
          test_losses.test_gradient_is_zero_at_the_exact_denoiser, ("simple", "eps", 300, 1)),
    Fault("clean sample shown to the network", "losses.diffusion_loss", "network(x_t, t)", "network(x0, t)",
          test_losses.test_descent_arrives_at_the_exact_denoiser, ("simple", "v", 1)),
    Fault("absolute errors called squares", "losses.diffusion_loss", 'norm == "l1"', 'norm == "l2"',
          test_losses.test_the_absolute_error_is_least_at_the_median),
    Fault("L_vlb allowed to move the mean", "losses.hybrid_loss", "prediction.detach()", "prediction",
          test_losses.test_hybrid_loss_trains_the_mean_by_least_squares_alone),
    Fault("L_vlb a mean for a sum", "losses.vlb_loss", "denoiser.schedule.T * ", "",
          test_losses.test_vlb_loss_averages_to_the_bound),
    Fault("score matched to noise over variance", "losses.score_matching_loss", "/ sigma**2", "/ sigma",
          test_losses.test_score_matching_is_the_noise_loss),
    Fault("importance without its weight", "timesteps.LossSecondMoment.forward", "1 / (len(p) * p[t])", "0 * p[t] + 1",
          test_timesteps.test_the_weighted_mean_is_the_uniform_mean),
    Fault("first moment for second", "timesteps.LossSecondMoment.probabilities",
          ".square().mean(1).sqrt()", ".mean(1)",
          test_timesteps.test_probabilities_follow_the_second_moment),
    Fault("dropout never resampled", "training/randomness.draw",
          "dropped < caption_dropout",
          "torch.rand((), generator=generator(seed, row)) < caption_dropout",
          test_randomness.test_captions_are_dropped_anew_each_epoch),
    # likelihood
    Fault("a KL that isn't zero at zero", "likelihood.normal_kl",
          "other_log_var - log_var - 1", "other_log_var - log_var",
          test_likelihood.test_bound_is_the_entropy_when_every_step_is_exact, (2,)),
    Fault("KL the other way round", "likelihood.vlb_term",
          "normal_kl(true_mean, torch.where(last, 1.0, true_var).log(), mean, log_var)",
          "normal_kl(mean, log_var, true_mean, torch.where(last, 1.0, true_var).log())",
          test_likelihood.test_terms_of_a_mixture_have_their_closed_form, ("v", "beta")),
    Fault("deviation for variance in the prior", "likelihood.prior_kl", "2 * sigma.log()", "sigma.log()",
          test_likelihood.test_prior_kl_against_torch),
    Fault("bins twice as wide", "likelihood.discretized_normal_log_prob", "1 / (levels - 1)", "2 / (levels - 1)",
          test_likelihood.test_bins_against_scipy, (0.5,)),
    Fault("outer bins closed", "likelihood.discretized_normal_log_prob",
          "math.inf, (x + half", "(x + half - mean) / std, (x + half",
          test_likelihood.test_bins_against_scipy, (0.5,)),
    Fault("nats called bits", "likelihood.bits_per_dim", " / math.log(2)", "", test_likelihood.test_units),
    Fault("a drawn step counted once", "evaluation/metrics/nll.nll", " / p[sampled]", "",
          test_nll.test_a_subset_of_steps_is_unbiased, (8,)),
    Fault("weights of the steps after", "evaluation/metrics/nll.nll",
          "weights[run.start : run.stop] / weights", "weights.roll(-1)[run.start : run.stop] / weights",
          test_nll.test_a_subset_of_steps_is_unbiased, (3,)),
    # guidance
    Fault("scale counted from the condition", "guidance.guide", "negative + scale", "positive + scale",
          test_guidance.test_guided_score_is_the_combination_of_the_exact_scores, ("eps", 3.0, "linear")),
    Fault("positive and negative exchanged", "guidance.guide", "(positive - negative)", "(negative - positive)",
          test_guidance.test_guided_sampling_draws_what_the_guided_ode_says, ("v", 1, 2.0)),
    Fault("one deviation for the whole batch", "guidance.rescale", "range(1, guided.ndim)", "range(guided.ndim)",
          test_guidance.test_rescale_restores_the_deviation_of_each_sample),
    Fault("away from the class", "guidance.classifier_guidance", "scale * gradient", "-scale * gradient",
          test_guidance.test_an_exact_classifier_guides_like_the_pair, ("eps", 1.0)),
    Fault("a score's change without sigma", "parameterization.add_to_score", "- sigma * change", "- change",
          test_guidance.test_an_exact_classifier_guides_like_the_pair, ("eps", 1.0)),
    Fault("v moved like eps", "parameterization.add_to_score", "- sigma * per_alpha * change", "- sigma * change",
          test_parameterization.test_adding_to_the_score_is_the_same_for_every_prediction, ("linear",)),
    Fault("interval open below and closed above", "guidance.interval_scale",
          "low <= t / T < high", "low < t / T <= high",
          test_guidance.test_interval_guides_inside_and_nowhere_else),
    Fault("classifier of clean samples", "guidance.classifier_loss", "q_sample(schedule, x0, t, eps)", "x0",
          test_guidance.test_the_classifier_loss_is_least_at_the_true_posterior),
    # the score view
    Fault("Langevin's sqrt(2) missing", "samplers.langevin_step", "(2 * step).sqrt()", "step.sqrt()",
          test_samplers.test_langevin_converges_to_the_marginal_with_order_one, (400,)),
    Fault("corrector at the timestep before", "samplers.predictor_corrector",
          "langevin_step(denoiser, x, s,", "langevin_step(denoiser, x, t,",
          test_samplers.test_predictor_corrector_takes_the_steps_of_the_paper),
    Fault("Euler called Heun", "samplers.heun_step", "width / 2 * (slope + slope_there)", "width * slope",
          test_samplers.test_ode_keeps_quantiles_with_order_two, ("linear", "vp")),
    Fault("density with the wrong sign", "samplers.probability_flow",
          "change + h / 2 * (div1", "change - h / 2 * (div1",
          test_samplers.test_hutchinson_is_unbiased),
    Fault("Jacobian of the VE view forgotten", "samplers.probability_flow", "math.log(scale[-1] / scale[0])", "0",
          test_samplers.test_ode_likelihood_in_both_forms, ("linear", "ve")),
    Fault("VE state shown to a VP network", "samplers._slope",
          "denoiser.eps(alpha * state, t)", "denoiser.eps(state, t)",
          test_samplers.test_first_step_of_each_form_is_its_equation),
    Fault("trace without its last element", "samplers.exact_divergence", "range(columns.shape[1])",
          "range(columns.shape[1] - 1)", test_samplers.test_divergence_of_pictures),
    Fault("Hutchinson's probe used once", "samplers.hutchinson_divergence", "(product * probe)", "product",
          test_samplers.test_hutchinson_is_unbiased),
]  # fmt: skip


@functools.cache
def lasting_schedules() -> list[NoiseSchedule]:
    """Those that modules hold; garbage collection passes over them (conftest.py), so it doesn't list them, either."""
    gc.unfreeze()
    found = [o for o in gc.get_objects() if type(o) is NoiseSchedule]
    gc.freeze()
    return found


def forget_tables() -> None:
    """Those that schedules keep: a right one would hide a fault, and a faulty one outlive it."""
    for schedule in lasting_schedules():
        for table in ("alpha_bar", "alpha", "sigma2", "sigma", "snr"):
            vars(schedule).pop(table, None)


def plant(fault: Fault, monkeypatch: pytest.MonkeyPatch) -> None:
    """Replace the function, wherever it was imported, by itself with `old` changed to `new`."""
    module_name, *path = fault.where.split(".")
    room, _, module_name = module_name.rpartition("/")
    owner: Any = importlib.import_module(f"ldm.{(room or 'diffusion').replace('/', '.')}.{module_name}")
    code_globals = vars(owner)
    for name in path[:-1]:
        owner = getattr(owner, name)
    original = vars(owner)[path[-1]]
    function = original.func if isinstance(original, cached_property) else inspect.unwrap(original)
    head, quotes, body = textwrap.dedent(inspect.getsource(function)).rpartition('"""')  # the docstring ends here
    assert body.count(fault.old) == 1, f"{fault.where}: expected {fault.old!r} once in\n{body}"
    namespace: dict[str, Any] = {}
    exec(compile(head + quotes + body.replace(fault.old, fault.new), fault.where, "exec"), code_globals, namespace)
    mutant = namespace[path[-1]]
    if isinstance(owner, type):
        monkeypatch.setattr(owner, path[-1], property(mutant.func) if isinstance(mutant, cached_property) else mutant)
        return
    for name, module in list(sys.modules.items()):  # wherever it was imported by name
        if name.startswith(("ldm.", "test_", "oracles")):
            for attribute, value in list(vars(module).items()):
                if value is original:
                    monkeypatch.setattr(module, attribute, mutant)


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.story)
def test_a_planted_fault_is_caught(fault: Fault, monkeypatch: pytest.MonkeyPatch) -> None:
    fault.check(*fault.arguments)
    forget_tables()
    try:
        with monkeypatch.context() as patch:
            plant(fault, patch)
            with pytest.raises(AssertionError):
                fault.check(*fault.arguments)
    finally:
        forget_tables()


@pytest.mark.parametrize("fault", FAULTS[:3], ids=lambda fault: fault.where)
def test_planting_alone_breaks_nothing(fault: Fault, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same text, compiled again and put in place: what the checks notice is the change."""
    with monkeypatch.context() as patch:
        plant(fault._replace(new=fault.old), patch)
        fault.check(*fault.arguments)
