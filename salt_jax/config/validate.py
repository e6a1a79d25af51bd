"""Values of a recipe that cannot stand together, each refused in one sentence that names the key
and the remedy.
"""

from collections.abc import Iterator

from salt_jax.config.schema import Recipe
from salt_jax.errors import UserError
from salt_jax.flow.schedule import explicit


def refuse_contradictions(r: Recipe) -> None:
    """Raises UserError for the first contradiction."""
    for check in (_batch, _ranges, _critic, _lora, _clip, _schedule, _levels, _optimizers):
        for contradiction in check(r):
            raise UserError(contradiction)


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


def _critic(r: Recipe) -> Iterator[str]:
    if r.init_critic and (r.stage != "distil" or not r.init_from):
        yield (
            f"config.init_critic=True takes the critic of config.init_from={r.init_from!r} for "
            f"config.stage={r.stage}; name the workdir of a distillation there, for another one, "
            "or set init_critic=False"
        )


def _lora(r: Recipe) -> Iterator[str]:
    if r.lora.rank and not r.lora.alpha:
        yield (
            f"config.lora.alpha=0.0 leaves the product of config.lora.rank={r.lora.rank} out; "
            "set it to the rank"
        )


def _clip(r: Recipe) -> Iterator[str]:
    (frames, height, width, channels), patch = r.clip_shape, r.wan.patch_size
    preset = f"config.model.preset={r.model.preset}"
    if r.world.size % r.world.patch:
        yield (
            f"config.world.patch={r.world.patch} must divide config.world.size={r.world.size}; "
            "change one of them"
        )
    if frames % patch[0] or height % patch[1] or width % patch[2]:
        yield (
            f"a clip of {frames} frames of {height} x {width} does not split into the {patch} "
            f"patches of {preset}; "
            "change config.world, config.data.clip or config.model.preset"
        )
    if channels != r.wan.out_channels:
        yield (
            f"{preset} makes {r.wan.out_channels} channels, this world of Moving Shapes has "
            f"{channels}; choose tiny or small, for world.patch=4 long"
        )
    if r.data.kind == "latents" and (r.teacher.kind != "network" or r.makes_teacher):
        yield (
            f"config.teacher.kind={r.teacher.kind} and config.stage={r.stage} do not go with "
            "config.data.kind=latents; set the kind of teacher to network and the stage to another "
            "one"
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
    if r.wan.image_dim and (r.causal or r.makes_teacher):
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


def _levels(r: Recipe) -> Iterator[str]:
    s = r.schedule
    if not s.levels:
        return
    try:
        count = len(explicit(s.levels)) - 1
    except ValueError as error:
        yield f"config.schedule.{error}; leave it () for the grid of train_levels and shift"
        return
    for name, value, wanted in (
        ("schedule.train_levels", s.train_levels, count),
        ("sample.num_steps", r.sample.num_steps, (count,)),
    ):
        if value != wanted:
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
