"""Values of a recipe that cannot stand together, each refused in one sentence that names the key and the remedy."""

import dataclasses
import json
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from salt_jax.errors import UserError

if TYPE_CHECKING:
    from salt_jax.train.recipe import Recipe

# Keys that may differ when a workdir goes on: they change how long and how often, not what an update does.
MAY_CHANGE = {"updates", "log_every", "save_every", "keep", "max_skipped", "sample", "mesh"}


# Keys that configs written earlier lack, with the value that says what those runs did.
SINCE = {("teacher", "weights"): ""}


def as_of_today(told: dict[str, Any]) -> dict[str, Any]:
    """A config that was written to a workdir or file, with the keys that came since."""
    told = {name: dict(value) if isinstance(value, dict) else value for name, value in told.items()}
    for (section, key), value in SINCE.items():
        told[section].setdefault(key, value)
    return told


def refuse_contradictions(r: "Recipe") -> None:
    """Raises UserError for the first contradiction."""
    for check in (_counts, _stage, _clip, _schedule, _rollout, _align, _stream, _optimizers):
        for told in check(r):
            raise UserError(told)


def refuse_another_run(before: str, r: "Recipe") -> None:
    """Raises UserError for the first value that what is there, made with the config `before`, does not share."""
    was, now = as_of_today(json.loads(before)), json.loads(json.dumps(dataclasses.asdict(r)))
    for config in (was, now):
        config["data"].pop("dir")  # the same data set may lie elsewhere
    decays = r.student_optimizer.decay or r.critic_optimizer.decay
    fixed = set(now) - MAY_CHANGE | ({"updates"} if decays else set())  # a decay is over the whole run
    for name in sorted(fixed):
        if was.get(name) != now[name]:
            raise UserError(
                f"this workdir was trained with config.{name} = {was.get(name)}, not {now[name]}; "
                "pass the config that made it, or a new --workdir"
            )


def _counts(r: "Recipe") -> Iterator[str]:
    names = ("updates", "batch_size", "critic_updates", "log_every", "save_every", "keep", "max_skipped")
    least_one = {name: getattr(r, name) for name in names}
    least_one |= {
        f"schedule.{name}": getattr(r.schedule, name) for name in ("train_updates", "anchor_updates")
    }
    least_one |= {"ode.updates": r.ode.updates, "ode.trajectories": r.ode.trajectories}
    for name, value in least_one.items():
        if value < 1:
            yield f"config.{name}={value} must be at least 1"


def _stage(r: "Recipe") -> Iterator[str]:
    if r.stage == "denoising" and r.teacher.kind == "network":
        yield "config.stage=denoising makes a teacher; set config.teacher.kind to data or closed_form"
    if r.stage == "distil" and r.teacher.kind == "data":
        yield "config.teacher.kind=data leaves no teacher to distil; set it to network or closed_form"
    if r.lora.rank and r.stage != "distil":
        yield f"config.lora.rank={r.lora.rank} is for config.stage=distil; set it to 0 in stage {r.stage}"
    if r.lora.rank and not r.lora.alpha:
        yield f"config.lora.alpha=0.0 leaves the product of config.lora.rank={r.lora.rank} out; set it to the rank"


def _clip(r: "Recipe") -> Iterator[str]:
    (frames, height, width, channels), patch = r.clip_shape, r.wan.patch_size
    preset = f"config.model.preset={r.model.preset}"
    if frames % patch[0] or height % patch[1] or width % patch[2]:
        yield (
            f"a clip of {frames} frames of {height} x {width} does not split into the {patch} patches of {preset}; "
            "change config.world, config.data.clip or config.model.preset"
        )
    if r.data.kind == "moving_shapes" and channels != 3:
        yield f"{preset} makes {channels} channels, Moving Shapes has 3; choose tiny or small"
    if r.data.kind == "latents" and (r.teacher.kind != "network" or r.stage == "denoising"):
        yield (
            f"config.teacher.kind={r.teacher.kind} and config.stage={r.stage} do not go with config.data.kind=latents; "
            "set the kind of teacher to network and the stage to another one"
        )
    if r.teacher.kind == "network" and r.teacher_wan != r.wan and r.weights and not r.teacher.weights:
        yield (
            f"config.teacher.preset={r.teacher.preset} does not fit the weights of {preset}; name its own in "
            "config.teacher.weights, or leave the preset empty"
        )
    if r.wan.image_dim and (r.causal or r.stage == "denoising"):
        yield f"{preset} makes whole clips of a picture; set config.stage=distil and config.video=noised"
    if r.wan.text_dim != r.text.dim:
        yield (
            f"config.text_encoder={r.text_encoder} writes rows of {r.text.dim}, {preset} reads rows of "
            f"{r.wan.text_dim}; choose two that fit"
        )
    if r.causal:
        try:
            r.memory.sizes(frames)
        except ValueError as error:
            yield f"{error}; change config.memory.chunk, config.memory.first or the clip's length"


def _schedule(r: "Recipe") -> Iterator[str]:
    s = r.schedule
    if s.train_updates % s.anchor_updates:
        yield f"config.schedule.anchor_updates={s.anchor_updates} must divide train_updates={s.train_updates}"
    if r.stage in ("ode_regression", "consistency") and r.ode.updates % s.train_updates:
        yield (
            f"config.schedule.train_updates={s.train_updates} must divide config.ode.updates={r.ode.updates}: "
            "trajectories are kept at the student's levels"
        )


def _rollout(r: "Recipe") -> Iterator[str]:
    if r.stage != "distil" or r.video != "rollout":
        return
    o, longest = r.rollout, r.schedule.train_updates
    if (
        len(o.updates) != len(o.probabilities)
        or abs(sum(o.probabilities) - 1) > 1e-6
        or min(o.probabilities) < 0
    ):
        yield (
            f"config.rollout.probabilities={o.probabilities} must be one for each of updates={o.updates} and sum to 1"
        )
    if max(o.updates) != longest or any(longest % k for k in o.updates):
        yield (
            f"config.rollout.updates={o.updates} must divide its largest, which must be "
            f"config.schedule.train_updates={longest}: self-consistency is trained there"
        )
    if o.first_updates < 0:
        yield f"config.rollout.first_updates={o.first_updates} must be 0 (as the other chunks) or more"
    if o.first_updates and r.loss.self_consistency:
        yield (
            f"config.rollout.first_updates={o.first_updates} gives the first chunk levels of its own, and "
            "self-consistency is trained at one level for all; set it or config.loss.self_consistency to 0"
        )


def _align(r: "Recipe") -> Iterator[str]:
    a = r.align
    if not a.weight:
        return
    if r.stage != "distil" or r.video != "rollout" or len(r.rollout.updates) < 2:
        yield (
            f"config.align.weight={a.weight} aligns rollouts of different numbers of updates; set it to 0, or "
            "config.video=rollout and more than one of config.rollout.updates"
        )
    if not 1 <= a.layers <= r.wan.num_layers:
        yield f"config.align.layers={a.layers} must be between 1 and the {r.wan.num_layers} layers of the network"
    if not 0 < a.probability <= 1:
        yield f"config.align.probability={a.probability} must be in (0, 1]"


def _stream(r: "Recipe") -> Iterator[str]:
    s, m, frames = r.stream, r.memory, r.clip_shape[0]
    if not s.max_frames:
        return
    if r.stage != "distil" or r.video != "rollout" or not m.window or m.first != m.chunk:
        yield (
            "config.stream.max_frames continues rollouts on a cache of fixed size: set config.stage=distil, "
            "config.video=rollout, config.memory.window and memory.first=memory.chunk, or max_frames=0"
        )
        return
    if s.overlap % m.chunk or not m.chunk <= s.overlap <= m.window - m.chunk - m.sink or s.overlap >= frames:
        yield (
            f"config.stream.overlap={s.overlap} must be a multiple of memory.chunk={m.chunk} that a cache of "
            f"{m.window - m.chunk} frames keeps behind its sink={m.sink}, and less than the clip's {frames}"
        )
    if frames < m.window - m.chunk:
        yield f"config.memory.window={m.window} must be filled by the first clip of {frames} frames; lower it"
    if s.max_frames < 2 * frames - s.overlap:
        yield f"config.stream.max_frames={s.max_frames} leaves no room to go on; set at least {2 * frames - s.overlap}"


def _optimizers(r: "Recipe") -> Iterator[str]:
    for name, o, updates in (
        ("student_optimizer", r.student_optimizer, r.updates),
        ("critic_optimizer", r.critic_optimizer, r.updates * r.critic_updates),
    ):
        if o.decay and o.warmup >= updates:
            yield f"config.{name}.warmup={o.warmup} leaves no update of {updates} to decay in; lower it"
