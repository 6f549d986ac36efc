"""All diagnostics of a trained agent as one page of HTML that needs nothing else."""

import base64
import io
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import jinja2
import numpy as np

from sb3_mbpo import __version__
from sb3_mbpo.common.buffers import n_transitions
from sb3_mbpo.common.checkpoints import atomic_file
from sb3_mbpo.diagnostics import figures
from sb3_mbpo.diagnostics.exploitation import Returns
from sb3_mbpo.diagnostics.open_loop import Replay
from sb3_mbpo.diagnostics.policy_shift import PolicyShift
from sb3_mbpo.diagnostics.terminations import Terminations
from sb3_mbpo.diagnostics.values import ValueCheck
from sb3_mbpo.dynamics.open_loop import TOLERANCE, OpenLoopError, trusted_steps
from sb3_mbpo.theory import optimal_rollout_length

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from sb3_mbpo.common.model_based import ModelBasedSAC


class Finding(NamedTuple):
    """A line of the summary."""

    question: str
    measured: str
    verdict: str


class Picture(NamedTuple):
    """A figure as it lies in the page."""

    alt: str
    data: str


class Section(NamedTuple):
    """One of the diagnostics: what was found, and how it was measured."""

    title: str
    paragraphs: list[str]
    how: str
    figures: list[Picture]


def percent(share: float) -> str:
    """
    :param share: Any
    :return: With its sign, unless it rounds to 0
    """
    text = f"{share:+.0%}"
    return "0%" if text[1:] == "0%" else text


def as_picture(figure: "Figure", alt: str) -> Picture:
    """
    :param figure: Any
    :param alt: What it shows, for those who do not see it
    :return: The figure as SVG, in the page itself
    """
    buffer = io.BytesIO()
    figure.savefig(buffer, format="svg", metadata={"Date": None})
    return Picture(alt, "data:image/svg+xml;base64," + base64.b64encode(buffer.getvalue()).decode())


def of_error(agent: "ModelBasedSAC", error: OpenLoopError) -> tuple[list[Finding], Section]:
    """
    :param agent: Whose model
    :param error: By step of a rollout
    :return: Findings and section
    """
    r2, relative, varies = error.r2(), error.relative(), error.varies()
    explained = np.nanmedian(r2[0, 1:][varies].cpu().numpy())
    if explained < 0:
        verdict = "Worse than a constant: the model knows nothing of these transitions. Do not train on it."
    elif explained < 0.5:
        verdict = "The model explains less than half. More data, or longer trainings of the model, are needed."
    elif explained < 0.95:
        verdict = "The model is usable for short rollouts."
    else:
        verdict = "One step of the model is nearly right."
    n_measured, trusted, k = len(relative), trusted_steps(error.relative("sample_rmse").tolist()), agent.rollout_length
    if trusted == 0:
        length = f"Even one step is off by more than {TOLERANCE:g} standard deviations; rollouts have k = {k}."
    elif k <= trusted:
        length = f"Rollouts, k = {k}, stay within that."
    elif trusted == n_measured:
        length = f"Rollouts, k = {k}, are longer than what was measured, {n_measured} steps (`--horizon`)."
    else:
        length = f"Rollouts, k = {k}, go further than the model is right for: {agent.advice_on_long_rollouts}."
    n_right = f"{trusted}" + (" or more" if trusted == n_measured else "")
    one, two = (inside[0, 1:][varies].mean().item() for inside in error.inside)
    if one < 0.55:
        calibration = "Overconfident: the truth lies outside the bands too often."
    elif one > 0.85:
        calibration = "The bands are wider than they need to be."
    else:
        calibration = "The model knows what it does not know."
    findings = [
        Finding("Does the model know what happens next?", f"median R² {explained:.2f}", verdict),
        Finding("Does it know the reward?", *of_reward(r2[0, 0].item())),
        Finding("For how many steps is it right?", n_right, length),
        Finding(
            "Are its error bars right?",
            f"{one:.0%} / {two:.0%}",
            f"Of the truth within 1 / 2 std (68 % / 95 %). {calibration}",
        ),
    ]
    worst = r2[0, 1:].nan_to_num(nan=1).argmin()
    section = Section(
        "Model error by step of a rollout",
        [
            f"After one step the model is off by {relative[0]:.3f} standard deviations of the real observations on average, "
            f"after {error.steps[-1]} steps by {relative[-1]:.3f}.",
            f"It knows least of obs[{worst}]: R² {r2[0, 1 + worst]:.2f} after one step.",
        ],
        f"{int(error.n_windows[0])} starts along fresh real trajectories that the model was not trained on; the recorded "
        "actions; each step an elite drawn at random and a sample from its Gaussian. R²: share of the variance of "
        f'the change since the start. "Right": a single trajectory of the model is off by at most {TOLERANCE:g} standard '
        "deviations (root mean square of the error of the mean and the predicted std).",
        [
            as_picture(figures.plot_error(error), "Model error, predicted standard deviation and calibration by step"),
            as_picture(figures.plot_dimensions(error), "R squared of each dimension"),
        ],
    )
    return findings, section


def of_reward(r2: float) -> tuple[str, str]:
    """
    :param r2: Share of the reward's variance that the model explains, NaN without variance
    :return: What was measured, and what it says
    """
    if np.isnan(r2):
        return "constant", "The reward did not vary in these trajectories."
    return f"R² {r2:.2f}", "1 is perfect, 0 is a constant."


def of_replay(replayed: Replay, columns: Sequence[int]) -> Section:
    """
    :param replayed: A real action sequence under the model
    :param columns: Which to show
    :return: Section
    """
    inside = (replayed.real - replayed.mean).abs() <= replayed.std
    # A band that is wider than all that happens holds everything, and says nothing
    says = replayed.std < replayed.real.std(dim=0, correction=0)
    share = f"{inside[says].float().mean():.0%}" if says.any() else "None"
    return Section(
        "The same actions under the model",
        [
            f"The band of one standard deviation is narrower than the truth's own for {says.float().mean():.0%} of the "
            f"{len(inside)} steps, over all dimensions. {share} of the truth lies inside it there."
        ],
        "Paper, Figure 4 a and b: the actions of one real episode, many times under the model from the same first state. "
        "Nothing ends the model's trajectories, and axes are limited to what is near the truth.",
        [as_picture(figures.plot_replay(replayed, columns), "A real action sequence in the environment and under the model")],
    )


def of_returns(measured: Returns, horizon: int) -> tuple[list[Finding], Section]:
    """
    :param measured: Under the model and in the environment
    :param horizon: Steps of a return
    :return: Findings and section
    """
    gap = float((measured.model - measured.real).mean())
    size = max(float(np.abs(measured.real).mean()), 1e-8)
    if gap > 0.2 * size:
        verdict = "The model promises more than the environment gives: the policy may exploit its errors."
    elif gap < -0.2 * size:
        verdict = "The model promises less than the environment gives."
    else:
        verdict = "The model promises about what the environment gives."
    finding = Finding("Does the policy exploit the model?", percent(gap / size), verdict)
    correlation = measured.correlation()
    known = "does not exist, as returns do not vary" if np.isnan(correlation) else f"is {correlation:.2f}"
    section = Section(
        "Returns under the model and in the environment",
        [
            f"From {len(measured.real)} states, {horizon} steps: {measured.real.mean():.4g} on average in the environment, "
            f"{measured.model.mean():.4g} under the model. The correlation over the states {known}."
        ],
        "Paper, Figure 4 c: the same stochastic policy from the same states; real returns from fresh trajectories. Terminal "
        "transitions end both.",
        [as_picture(figures.plot_returns(measured), "Returns under the model beside returns in the environment")],
    )
    return [finding], section


def of_terminations(measured: Terminations) -> tuple[list[Finding], Section]:
    """
    :param measured: Where episodes ended, and where the model ends them
    :return: Findings and section
    """
    n_real, foreseen, invented = int(measured.real.sum()), measured.foreseen(), measured.invented()
    if foreseen < 0.8:
        verdict = "The model goes on where episodes end: a policy that learns from it does not learn to avoid that."
    elif invented > max(0.5 * n_real, 1):
        verdict = "The model ends episodes that go on: a policy that learns from it avoids what is harmless."
    elif n_real == 0:
        verdict = "No episode ended, and the model ends hardly any."
    else:
        verdict = "The model ends episodes where they end."
    finding = Finding("Does it see where episodes end?", f"{foreseen:.0%} of {n_real}" if n_real else "none ended", verdict)
    section = Section(
        "Where episodes end",
        [
            f"Of {len(measured.real):,} transitions {n_real} were terminal."
            + (f" The model ends there with a probability of {foreseen:.0%}." if n_real else "")
            + f" Of the others, after which the episode went on, it ends {invented:.1f} on average."
        ],
        "One step of the model from each state of the fresh trajectories, with the recorded action, many times. Timeouts do "
        "not count.",
        [],
    )
    return [finding], section


def of_values(check: ValueCheck) -> tuple[list[Finding], Section]:
    """
    :param check: Q-values and returns
    :return: Findings and section
    """
    bias = check.relative_bias()
    verdict = "Q-values are about right."
    if bias > 0.5:
        verdict = "The critics overestimate: training may collapse. Fewer updates per step, or a better model, help."
    elif bias > 0.2:
        verdict = "The critics overestimate somewhat: watch whether it grows."
    elif bias < -0.2:
        verdict = "The critics underestimate, which is safe, but slow."
    q_model = f" Q-values of generated transitions are {check.q_model.mean():.4g} on average." if len(check.q_model) else ""
    section = Section(
        "Values",
        [f"Q-values are {check.q_real.mean():.4g} on average, the returns that came {check.returns.mean():.4g}.{q_model}"],
        "Q of the lowest critic (DHMBPO: the critics' mean) for the actions that were taken, beside the soft discounted "
        "return of the rest of the episode; of episodes that were cut off, the critics' own value stands for what was not "
        "seen, and weighs no more than half. Units are those that the critics learn.",
        [as_picture(figures.plot_values(check), "Q-values beside returns, and their distributions")],
    )
    findings = [Finding("Are Q-values right?", f"{percent(bias)} of the returns", verdict)]
    if len(check.promised):
        promise = check.relative_promise()
        verdict = "What the actor maximises is about what comes."
        if promise > 0.2:
            verdict = "The actor is promised more than comes: by the model's rewards, or by the critics at their end."
        elif promise < -0.2:
            verdict = "The actor is promised less than comes, which is safe, but slow."
        findings.append(
            Finding("Does the actor get what its rollouts promise?", f"{percent(promise)} of the returns", verdict)
        )
        section.paragraphs.append(
            f"From the same states the actor's training rollouts promise {check.promised.mean():.4g} on average, entropy "
            f"included; {check.gained.mean():.4g} came."
        )
    return findings, section


def of_shift(shift: PolicyShift, gamma: float) -> tuple[list[Finding], Section]:
    """
    :param shift: Errors under other policies
    :param gamma: Discount
    :return: Findings and section
    """
    slopes, most = shift.slopes(), int(np.argmax(shift.data_sizes))
    size, error, distance = shift.data_sizes[most], float(shift.model_error[most, -1]), float(shift.shift[-1])
    measured = "gamma is 1"
    if gamma < 1:
        # Beyond the effective horizon nothing changes
        best = min(optimal_rollout_length(error, distance, gamma), 1 / (1 - gamma))
        measured = f"k* = {best:.0f}"
    if error < distance:
        verdict = "It generalises better than the policy moves, so the bound allows rollouts."
    else:
        verdict = "It errs no less than the policy moves, so the bound allows no rollout; it is pessimistic."
    finding = Finding(
        "What would the paper's bound say?",
        measured,
        f"Theorem 4.3 for a new model that knows {size:,} transitions of the present policy, under the last of the later "
        f"policies: error {error:.2f}, policy shift {distance:.2f}, as total variation. {verdict} This is not the agent's own "
        "model, whose k* from one training to the next is in the log. The error is what a model does not generalise to, not "
        "what it has not learned.",
    )
    section = Section(
        "Policies that move away from the data",
        [
            f"A model of {size:,} transitions of the present policy: error {shift.error[most, 0]:.3f} on its own new data, "
            f"{shift.error[most, -1]:.3f} on those of the last policy, in standard deviations of the changes.",
            "d error / d policy shift (total variation): "
            + ", ".join(f"{slope:.2f} ({n:,})" for n, slope in zip(shift.data_sizes, slopes, strict=True))
            + ".",
        ],
        "Paper, Figure 1: models trained on data of one policy only, measured on fresh data of others. The divergence is "
        "the mean over their states; total variation by Pinsker's inequality; for the model by the likelihood of new data "
        "beside that of those it was trained on, a surrogate.",
        [as_picture(figures.plot_policy_shift(shift), "Model error beside the divergence of the policy, and its slope")],
    )
    return [finding], section


def write_report(
    path: str | Path, agent: "ModelBasedSAC", env_id: str, findings: Sequence[Finding], sections: Sequence[Section]
) -> None:
    """
    Write the page, in one step: an older one is replaced when it is complete.

    :param path: Where
    :param agent: Whose report it is
    :param env_id: Name of the environment
    :param findings: The summary
    :param sections: The rest
    """
    assert agent.replay_buffer is not None
    facts = [
        ("Environment", env_id),
        ("Steps", f"{agent.lifetime_timesteps:,}, model last trained at {agent.last_model_training:,}"),
        ("Ensemble", f"{agent.num_elites} elites of {agent.ensemble_size}, hidden layers {list(agent.model_hidden_sizes)}"),
        ("Rollouts", agent.about_rollouts),
        ("Replay buffer", f"{n_transitions(agent.replay_buffer):,} transitions"),
        ("Made by", f"sb3_mbpo {__version__}"),
    ]
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("sb3_mbpo.diagnostics", "."), autoescape=True, undefined=jinja2.StrictUndefined
    )
    page = environment.get_template("report.html").render(
        title=f"Is the model good enough? {env_id}", facts=facts, findings=findings, sections=sections
    )
    with atomic_file(path, "html") as file:
        file.write(page.encode())
