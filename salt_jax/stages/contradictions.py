"""What stages refuse beyond config/validate: one sentence for each contradiction, which names the
key and the remedy.
"""

from collections.abc import Iterator

from salt_jax.config.schema import Recipe
from salt_jax.rollout.draws import aligned_steps, shorter_steps

NO_ALIGNMENT = (
    "config.align.weight={} aligns rollouts of different numbers of steps; set it to 0, or "
    "config.stage=distil, config.video=rollout and more than one of config.rollout.num_steps"
)
NO_STREAM = (
    "config.stream.max_frames continues rollouts on a cache of fixed size: set "
    "config.stage=distil, config.video=rollout, config.memory.window and "
    "memory.first=memory.chunk, or max_frames=0"
)


def no_rollouts(r: Recipe) -> Iterator[str]:
    """Of a run without rollouts."""
    if r.align.weight:
        yield NO_ALIGNMENT.format(r.align.weight)
    if r.stream.max_frames:
        yield NO_STREAM
    if not r.memory.clean_pass:
        yield (
            f"config.memory.context={r.memory.context} is of chunks that were made step by step; "
            'set it to "clean", or config.stage=distil and config.video=rollout'
        )


def no_lora(r: Recipe) -> Iterator[str]:
    """Of a stage that trains all parameters."""
    if r.lora.rank:
        yield (
            f"config.lora.rank={r.lora.rank} is for config.stage=distil; set it to 0 in stage "
            f"{r.stage}"
        )


def causal_teacher(r: Recipe) -> Iterator[str]:
    """Of a stage with a causal teacher."""
    s = r.schedule
    if r.ode.num_steps % s.train_levels and not s.levels:
        yield (
            f"config.schedule.train_levels={s.train_levels} must divide "
            f"config.ode.num_steps={r.ode.num_steps}: trajectories are kept at the student's levels"
        )


def rollouts(r: Recipe) -> Iterator[str]:
    """Of a student that generates its own videos."""
    count = len(r.schedule.levels)
    if count and r.rollout.num_steps != (count,):
        yield (
            f"config.rollout.num_steps={r.rollout.num_steps} does not go with the {count} levels "
            f"of config.schedule.levels={r.schedule.levels}; set it to {(count,)}, or leave the "
            "levels ()"
        )
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


def alignment(r: Recipe) -> Iterator[str]:
    """Of cache alignment between its rollouts."""
    a = r.align
    if not a.weight:
        return
    if len(r.rollout.num_steps) < 2:
        yield NO_ALIGNMENT.format(a.weight)
    if a.network == "teacher" and r.teacher.kind != "network":
        yield (
            f"config.align.network=teacher has no features where config.teacher.kind="
            f"{r.teacher.kind}; set config.align.network=base"
        )
    if not 1 <= a.layers <= r.features_wan.num_layers:
        yield (
            f"config.align.layers={a.layers} must be between 1 and the "
            f"{r.features_wan.num_layers} layers of the network"
        )
    can, aligned = shorter_steps(r), aligned_steps(r)
    if not set(a.num_steps) <= set(can):
        yield (
            f"config.align.num_steps={a.num_steps} must be among {can}, the "
            "config.rollout.num_steps with a denser schedule"
        )
    elif a.lowest_exit >= max(aligned, default=1):
        yield (
            f"config.align.lowest_exit={a.lowest_exit} leaves no update with the term: "
            f"config.align.num_steps are {aligned}; lower it"
        )
    if not 0 < a.probability <= 1:
        yield f"config.align.probability={a.probability} must be in (0, 1]"


def streams(r: Recipe) -> Iterator[str]:
    """Of streaming long tuning."""
    s, m, frames = r.stream, r.memory, r.clip_shape[0]
    if not s.max_frames:
        return
    if not m.window or m.first != m.chunk:
        yield NO_STREAM
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
    if s.reencode and r.data.kind != "latents":
        yield (
            f"config.stream.reencode={s.reencode} decodes latents of Wan's VAE, and those of "
            "Moving Shapes are frames; set it to 0"
        )
    if s.reencode > frames - s.overlap + 1:
        yield (
            f"config.stream.reencode={s.reencode} is more than the {frames - s.overlap + 1} latent "
            f"frames that a clip of {frames} has up to its overlap; lower it"
        )
    if s.max_frames < 2 * frames - s.overlap:
        yield (
            f"config.stream.max_frames={s.max_frames} leaves no room to go on; set at least "
            f"{2 * frames - s.overlap}"
        )
