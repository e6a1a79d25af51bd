"""Values of a recipe that cannot stand together, each refused in one sentence that names the key
and the remedy.
"""

from collections.abc import Iterator

from salt_jax.config.schema import Recipe
from salt_jax.errors import UserError
from salt_jax.flow.schedule import explicit


def refuse_contradictions(r: Recipe) -> None:
    """Raises UserError for the first contradiction."""
    checks = (
        _batch,
        _ranges,
        _stage,
        _clip,
        _schedule,
        _levels,
        _rollout,
        _align,
        _stream,
        _optimizers,
    )
    for check in checks:
        for told in check(r):
            raise UserError(told)


def refuse_uneven(r: Recipe, ways: int) -> None:
    """Raises UserError where the batch does not spread over `ways` devices (mesh data x fsdp) in
    equal parts.
    """
    if r.batch_size % (ways * r.accumulate):
        raise UserError(
            f"config.batch_size={r.batch_size} must be a multiple of mesh data x fsdp = {ways}, "
            "times "
            f"config.accumulate={r.accumulate}; change one of them"
        )


def _batch(r: Recipe) -> Iterator[str]:
    if r.batch_size % r.accumulate:
        yield (
            f"config.batch_size={r.batch_size} must be a multiple of "
            f"config.accumulate={r.accumulate}"
        )


def _ranges(r: Recipe) -> Iterator[str]:
    if r.renoise.lowest > r.renoise.highest:
        yield (
            f"config.renoise.lowest={r.renoise.lowest} must not be above "
            f"config.renoise.highest={r.renoise.highest}"
        )
    if r.data.kind == "latents" and (len(r.data.clip) != 3 or min(r.data.clip) < 1):
        yield (
            f"config.data.clip={r.data.clip} must be frames, height and width of a latent clip, "
            "such as (21, 60, 104)"
        )


def _stage(r: Recipe) -> Iterator[str]:
    if r.stage == "denoising" and r.teacher.kind == "network":
        yield (
            "config.stage=denoising makes a teacher; set config.teacher.kind to data or closed_form"
        )
    if r.stage == "distil" and r.teacher.kind == "data":
        yield (
            "config.teacher.kind=data leaves no teacher to distil; set it to network or closed_form"
        )
    if r.lora.rank and r.stage != "distil":
        yield (
            f"config.lora.rank={r.lora.rank} is for config.stage=distil; set it to 0 in stage "
            f"{r.stage}"
        )
    if r.lora.rank and not r.lora.alpha:
        yield (
            f"config.lora.alpha=0.0 leaves the product of config.lora.rank={r.lora.rank} out; "
            "set it to the rank"
        )


def _clip(r: Recipe) -> Iterator[str]:
    (frames, height, width, channels), patch = r.clip_shape, r.wan.patch_size
    preset = f"config.model.preset={r.model.preset}"
    if frames % patch[0] or height % patch[1] or width % patch[2]:
        yield (
            f"a clip of {frames} frames of {height} x {width} does not split into the {patch} "
            f"patches of {preset}; "
            "change config.world, config.data.clip or config.model.preset"
        )
    if r.data.kind == "moving_shapes" and channels != 3:
        yield f"{preset} makes {channels} channels, Moving Shapes has 3; choose tiny or small"
    if r.data.kind == "latents" and (r.teacher.kind != "network" or r.stage == "denoising"):
        yield (
            f"config.teacher.kind={r.teacher.kind} and config.stage={r.stage} do not go with "
            "config.data.kind=latents; "
            "set the kind of teacher to network and the stage to another one"
        )
    if (
        r.teacher.kind == "network"
        and r.teacher_wan != r.wan
        and r.weights
        and not r.teacher.weights
    ):
        yield (
            f"config.teacher.preset={r.teacher.preset} does not fit the weights of {preset}; name "
            "its own in "
            "config.teacher.weights, or leave the preset empty"
        )
    if r.wan.image_dim and (r.causal or r.stage == "denoising"):
        yield (
            f"{preset} makes whole clips of a picture; set config.stage=distil and "
            "config.video=noised"
        )
    if r.wan.text_dim != r.text.dim:
        yield (
            f"config.text_encoder={r.text_encoder} writes rows of {r.text.dim}, {preset} reads "
            "rows of "
            f"{r.wan.text_dim}; choose two that fit"
        )
    if r.causal:
        try:
            r.memory.sizes(frames)
        except ValueError as error:
            yield f"{error}; change config.memory.chunk, config.memory.first or the clip's length"


def _schedule(r: Recipe) -> Iterator[str]:
    s = r.schedule
    if s.train_levels % s.anchor_levels:
        yield (
            f"config.schedule.anchor_levels={s.anchor_levels} must divide "
            f"train_levels={s.train_levels}"
        )
    if (
        r.stage in ("ode_regression", "consistency")
        and r.ode.num_steps % s.train_levels
        and not s.levels
    ):
        yield (
            f"config.schedule.train_levels={s.train_levels} must divide "
            f"config.ode.num_steps={r.ode.num_steps}: "
            "trajectories are kept at the student's levels"
        )


def _levels(r: Recipe) -> Iterator[str]:
    s = r.schedule
    if not s.levels:
        return
    try:
        count = len(explicit(s.levels)) - 1
    except ValueError as error:
        yield f"config.schedule.{error}; leave it () for the grid of train_levels and shift"
        return
    if r.stage == "denoising":
        yield (
            f"config.schedule.levels={s.levels} are a student's, and stage denoising makes a "
            "teacher; leave them ()"
        )
    for name, value, wanted in (
        ("schedule.train_levels", s.train_levels, count),
        ("rollout.num_steps", r.rollout.num_steps, (count,)),
        ("sample.num_steps", r.sample.num_steps, (count,)),
    ):
        used = name != "rollout.num_steps" or (r.stage == "distil" and r.video == "rollout")
        if used and value != wanted:
            yield (
                f"config.{name}={value} does not go with the {count} levels of "
                f"config.schedule.levels={s.levels}; "
                f"set it to {wanted}, or leave the levels ()"
            )
    if r.rollout.first_steps not in (0, count):
        yield (
            f"config.rollout.first_steps={r.rollout.first_steps} is not the {count} levels of "
            f"config.schedule.levels={s.levels}; set it to 0, or leave the levels ()"
        )


def _rollout(r: Recipe) -> Iterator[str]:
    if r.stage != "distil" or r.video != "rollout":
        return
    o, longest = r.rollout, r.schedule.train_levels
    if (
        len(o.num_steps) != len(o.probabilities)
        or abs(sum(o.probabilities) - 1) > 1e-6
        or min(o.probabilities) < 0
    ):
        yield (
            f"config.rollout.probabilities={o.probabilities} must be one for each of "
            f"num_steps={o.num_steps} and sum to 1"
        )
    if max(o.num_steps) != longest or any(longest % k for k in o.num_steps):
        yield (
            f"config.rollout.num_steps={o.num_steps} must divide its largest, which must be "
            f"config.schedule.train_levels={longest}: self-consistency is trained there"
        )
    if o.first_steps < 0:
        yield (
            f"config.rollout.first_steps={o.first_steps} must be 0 (as the other chunks) or more"
        )
    if o.first_steps and r.loss.self_consistency:
        yield (
            f"config.rollout.first_steps={o.first_steps} gives the first chunk levels of its "
            "own, and "
            "self-consistency is trained at one level for all; set it or "
            "config.loss.self_consistency to 0"
        )


def _align(r: Recipe) -> Iterator[str]:
    a = r.align
    if not a.weight:
        return
    if r.stage != "distil" or r.video != "rollout" or len(r.rollout.num_steps) < 2:
        yield (
            f"config.align.weight={a.weight} aligns rollouts of different numbers of steps; set "
            "it to 0, or "
            "config.video=rollout and more than one of config.rollout.num_steps"
        )
    if not 1 <= a.layers <= r.wan.num_layers:
        yield (
            f"config.align.layers={a.layers} must be between 1 and the {r.wan.num_layers} layers "
            "of the network"
        )
    if not 0 < a.probability <= 1:
        yield f"config.align.probability={a.probability} must be in (0, 1]"


def _stream(r: Recipe) -> Iterator[str]:
    s, m, frames = r.stream, r.memory, r.clip_shape[0]
    if not s.max_frames:
        return
    if r.stage != "distil" or r.video != "rollout" or not m.window or m.first != m.chunk:
        yield (
            "config.stream.max_frames continues rollouts on a cache of fixed size: set "
            "config.stage=distil, "
            "config.video=rollout, config.memory.window and memory.first=memory.chunk, or "
            "max_frames=0"
        )
        return
    if (
        s.overlap % m.chunk
        or not m.chunk <= s.overlap <= m.window - m.chunk - m.sink
        or s.overlap >= frames
    ):
        yield (
            f"config.stream.overlap={s.overlap} must be a multiple of memory.chunk={m.chunk} that "
            "a cache of "
            f"{m.window - m.chunk} frames keeps behind its sink={m.sink}, and less than the clip's "
            f"{frames}"
        )
    if frames < m.window - m.chunk:
        yield (
            f"config.memory.window={m.window} must be filled by the first clip of {frames} "
            "frames; lower it"
        )
    if s.max_frames < 2 * frames - s.overlap:
        yield (
            f"config.stream.max_frames={s.max_frames} leaves no room to go on; set at least "
            f"{2 * frames - s.overlap}"
        )


def _optimizers(r: Recipe) -> Iterator[str]:
    for name, o, updates in (
        ("student_optimizer", r.student_optimizer, r.iterations),
        ("critic_optimizer", r.critic_optimizer, r.iterations * r.critic_ratio),
    ):
        if o.decay and o.warmup >= updates:
            yield (
                f"config.{name}.warmup={o.warmup} leaves no update of {updates} to decay in; "
                "lower it"
            )
