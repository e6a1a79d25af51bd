"""Distillation: the student learns from teacher and critic, the critic from the student's videos.

Salt Eq. 13: minimise L_DMD + lambda_SC L_SC + lambda_align L_align over the student, while the
critic follows the student's videos by flow matching. For whole clips that is Eq. 10.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from jaxtyping import Array, Float

from salt_jax.config.schema import Recipe
from salt_jax.flow.prediction import add_noise
from salt_jax.losses.cache_alignment import cache_alignment_loss
from salt_jax.losses.dmd import dmd_loss
from salt_jax.losses.flow_matching import flow_matching_loss
from salt_jax.losses.self_consistency import self_consistency_loss
from salt_jax.models.denoiser import WanDenoiser, guided
from salt_jax.models.lora import init_lora, merge
from salt_jax.rollout.causal import Origin
from salt_jax.rollout.draws import Draw, Terms, as_reference, draw_rollout
from salt_jax.rollout.parallel import midpoint
from salt_jax.stages import contradictions, distil_passes, streams, teachers
from salt_jax.stages.judging import judged
from salt_jax.stages.networks import denoiser_of
from salt_jax.stages.stage import (
    Aux,
    Batch,
    Frozen,
    Inputs,
    Memory,
    Metrics,
    Parts,
    Pass,
    RecordSource,
    Update,
    Weights,
)
from salt_jax.stages.start import (
    StartNoise,
    StartState,
    as_steps,
    draw_start,
    noised_clip,
    rolled_out,
    self_rollout,
)
from salt_jax.state import Stream, TrainState, first_state
from salt_jax.types import Denoiser, Latent, Params, PRNGKey

Losses = dict[str, Float[Array, "b"]]


@dataclass(frozen=True)
class Distil:
    """Student and critic under a teacher."""

    recipe: Recipe
    mesh: Mesh | None = None
    learners = ("student", "critic")

    @property
    def student(self) -> WanDenoiser:
        return denoiser_of(self.recipe, self.mesh)

    critic = student

    @property
    def needs(self) -> tuple[str, ...]:
        if self.recipe.video != "rollout":
            return ("cond", "video")
        stream = self.recipe.stream
        return ("cond", "switch") if stream.max_frames and stream.switch else ("cond",)

    @property
    def teacher(self) -> Denoiser:
        """Without guidance."""
        return teachers.denoiser(self.recipe, self.mesh)

    def contradictions(self) -> Iterator[str]:
        r = self.recipe
        yield from teachers.contradictions(r)
        if r.video == "rollout":
            checks = contradictions.rollouts, contradictions.alignment, contradictions.streams
        else:
            checks = (contradictions.no_rollouts,)
        for check in checks:
            yield from check(r)

    def parts(self) -> Parts:
        r = self.recipe
        parts = [("critic", r.init_from if r.init_critic else r.weights), teachers.part(r)]
        parts += [("alignment", r.weights)] * self._looks_at_base
        return parts + [("VAE", r.weights)] * r.reencodes

    @property
    def _looks_at_base(self) -> bool:
        return bool(self.recipe.align.weight) and self.recipe.align.network == "base"

    def frozen(self, weights: Weights) -> Frozen:
        frozen, r = teachers.frozen(weights), self.recipe
        if self._looks_at_base or (r.lora.rank and not r.init_critic):
            frozen["base"] = weights.base
        if r.lora.rank and r.init_critic:
            frozen["critic"] = weights.critic
        if r.reencodes:
            frozen["vae"] = weights.vae
        return frozen | ({"student": weights.start} if r.lora.rank else {})

    def first_state(self, weights: Weights) -> TrainState:
        r = self.recipe
        starts = weights.start, weights.critic if r.init_critic else weights.base
        if r.lora.rank:
            keys = jax.random.split(jax.random.key(r.seed))
            starts = tuple(init_lora(k, p, r.lora.rank) for k, p in zip(keys, starts, strict=True))
        stream = streams.first_stream(self.student, weights, r) if r.stream.max_frames else None
        return first_state(r, dict(zip(self.learners, starts, strict=True)), stream)

    def records(self, source: RecordSource) -> Sequence:
        return source.clips

    def updates(self, iteration: int) -> list[tuple[Update, Draw | None]]:
        """One of the student, then `critic_ratio` of the critic, each with a draw of its own."""
        r = self.recipe
        calls = []
        for i in range(1 + r.critic_ratio):
            terms = Terms(self_consistency=r.loss.self_consistency > 0)
            draw = None
            if r.video == "rollout":
                terms, draw = draw_rollout(r, iteration, iteration * (1 + r.critic_ratio) + i)
            # the critic has one term, whatever the student has
            update = Update("critic", Terms(sequence=terms.sequence)) if i else None
            calls.append((update or Update("student", terms), draw))
        return calls

    def noise(self, key: PRNGKey, batch: Batch) -> StartNoise:
        return draw_start(key, batch, self.recipe)

    def loss(self, params: Params, inputs: Inputs, update: Update) -> tuple[Float[Array, ""], Aux]:
        losses = {"student": student_losses, "critic": critic_losses}[update.moves]
        by_example, metrics, stream = losses(self, params, inputs, update.terms)
        r = self.recipe
        weights = {"self_consistency": r.loss.self_consistency, "alignment": r.align.weight}
        means = {name: loss.mean() for name, loss in by_example.items()}
        total = jnp.stack([weights.get(name, 1.0) * mean for name, mean in means.items()]).sum()
        return total, Aux(means | metrics, stream)

    def whole(self, learner: str, params: Params, frozen: Frozen) -> Params:
        """The parameters of a network, its adapter merged into what that adapts."""
        of_critic = "critic" if self.recipe.init_critic else "base"
        base = {"student": "student", "critic": of_critic}[learner]
        return merge(frozen.get(base), params, self.recipe.lora)

    def origin(self, params: Params, inputs: Inputs, terms: Terms) -> Origin:
        """The prompts of an update and the cache it continues: those of the video under way,
        unless a new one starts.
        """
        draw = inputs.draw
        if inputs.state.stream is None or terms.sequence == "new":
            return Origin(inputs.batch.cond, start=draw.start if draw else 0)
        params = jax.lax.stop_gradient(params)
        return streams.under_way(self.student, params, inputs, self.recipe)

    def start(
        self, params: Params, origin: Origin, inputs: Inputs, draw: Draw | None
    ) -> StartState:
        """The student's state before the evaluation that gets gradient. Both learners see the same
        mixture of states.
        """
        if draw is None:
            return noised_clip(inputs.batch, inputs.noise, self.recipe)
        params, steps = jax.lax.stop_gradient(params), as_steps(draw, self.recipe)
        made = self_rollout(self.student, params, origin, steps, inputs.noise.keys, self.recipe)
        start = rolled_out(made, origin, draw, self.recipe)
        if origin.cache is None or not self.recipe.reencodes:
            return start
        return streams.as_window(start, inputs, self.recipe, self.mesh)

    def reference(self, params: Params, origin: Origin, inputs: Inputs) -> Latent:
        """The video that cache alignment aligns to: of twice the steps, on its own cache.

        A first chunk with steps of its own has no level between the student's.
        """
        assert inputs.draw is not None
        params, draw = jax.lax.stop_gradient(params), as_reference(inputs.draw, self.recipe)
        steps = replace(as_steps(draw, self.recipe), noise=self.recipe.align.reference_noise)
        if steps.first and steps.noise == "own":
            steps = replace(steps, first=replace(steps.first, noise="own"))
        keys = inputs.noise.keys
        return self_rollout(self.student, params, origin, steps, keys, self.recipe).x0

    def next_stream(
        self, start: StartState, origin: Origin, inputs: Inputs, terms: Terms
    ) -> Stream | None:
        """What the next update continues from."""
        made = start.trajectory
        if made is None or not self.recipe.stream.max_frames:
            return None
        return streams.next_stream(made, origin, inputs, terms.sequence, self.recipe)

    def passes(self, update: Update, draw: Draw | None) -> list[Pass]:
        mix = distil_passes.mix_of(self.recipe, update, draw)
        return distil_passes.passes(self.recipe, update.moves, mix)

    def mean_passes(self, learner: str) -> list[Pass]:
        return distil_passes.passes(self.recipe, learner, distil_passes.mean_mix(self.recipe))

    def memory(self, update: Update) -> Memory:
        return distil_passes.memory(self.recipe, update)


def student_losses(
    stage: Distil, params: Params, inputs: Inputs, terms: Terms
) -> tuple[Losses, Metrics, Stream | None]:
    """Salt Eq. 13, of whole clips Eq. 10. `terms` is static: its ifs are gone after tracing."""
    r, frozen, renoised = stage.recipe, inputs.frozen, inputs.noise.renoised
    student = stage.whole("student", params, frozen)
    critic = stage.whole("critic", inputs.state.learners["critic"].params, frozen)
    denoise = stage.student.denoise
    # 1. A video without gradient; its exit step again, of all chunks at once, with gradient.
    origin = stage.origin(student, inputs, terms)
    start = stage.start(student, origin, inputs, inputs.draw)
    video = denoise(student, start.x, start.sigma, origin.cond, start.plan)
    # 2. Teacher and critic judge one noised copy of it.
    judge = judged(start.with_overlap(video.x0), renoised, origin.cond, r.renoise)
    teacher, weights = guided(
        stage.teacher, frozen["teacher"], frozen["null_text"], r.teacher.guidance
    )
    x0_teacher = start.new(judge.by(teacher, weights).x0)
    x0_critic = start.new(judge.by(stage.critic, critic).x0)
    # 3. The equations.
    losses = {"dmd": dmd_loss(video.x0, x0_critic, x0_teacher)}  # Eq. 4
    metrics = {"dmd_gap": jnp.abs(x0_critic - x0_teacher).mean()}
    if terms.self_consistency:  # Eq. 8
        stop, weight = r.loss.stop_gradient, r.loss.level_weight
        triple = start.sigma, start.sigma_m, start.sigma_e
        x_m = midpoint(start.x, video.velocity, *triple[:2], stop in ("midpoint", "composed"))
        second = jax.lax.stop_gradient(student) if stop == "composed" else student
        v_m = denoise(second, x_m, start.sigma_m, origin.cond, start.still_plan).velocity
        losses["self_consistency"] = self_consistency_loss(
            video.velocity, v_m, *triple, stop, weight
        )
    if terms.alignment:  # Eq. 12
        reference = stage.reference(student, origin, inputs)
        judges = frozen | {"critic": critic, "student": student}
        fixed = jax.lax.stop_gradient(judges[r.align.network])
        network = stage.teacher if r.align.network == "teacher" else stage.student
        assert isinstance(network, WanDenoiser), "a formula has no features"
        noise = inputs.noise.aligned or renoised

        def features(x0: Latent) -> Float[Array, "b f s d"]:
            x = add_noise(start.with_overlap(x0), *noise)
            layers = r.align.layers
            return start.new(network.features(fixed, x, noise.sigma, origin.cond, layers))

        low, high = features(video.x0), features(reference)
        losses["alignment"], active = cache_alignment_loss(low, high, r.align.margin)
        metrics["alignment_active"] = active.mean()
    return losses, metrics, stage.next_stream(start, origin, inputs, terms)


def critic_losses(
    stage: Distil, params: Params, inputs: Inputs, terms: Terms
) -> tuple[Losses, Metrics, Stream | None]:
    """The critic learns to denoise the student's videos, so that Eq. 4 has the student's score."""
    frozen, renoised = inputs.frozen, inputs.noise.renoised
    student = stage.whole("student", inputs.state.learners["student"].params, frozen)
    critic = stage.whole("critic", params, frozen)
    origin = stage.origin(student, inputs, terms)
    start = stage.start(student, origin, inputs, inputs.draw)
    if start.trajectory:
        x0 = start.trajectory.x0
    else:
        x0 = stage.student.denoise(student, start.x, start.sigma, origin.cond, start.plan).x0
    judge = judged(start.with_overlap(x0), renoised, origin.cond, stage.recipe.renoise)
    said = judge.by(stage.critic, critic)
    loss = flow_matching_loss(start.new(said.velocity), x0, start.new(renoised.noise))
    return {"critic": loss}, {}, stage.next_stream(start, origin, inputs, terms)
