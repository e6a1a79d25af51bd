"""What makes videos, as one object: `load`, and `Model.generate` and `Model.stream`."""

from salt_jax.config.method import Teacher
from salt_jax.errors import UserError
from salt_jax.io.files import AnyPath
from salt_jax.io.header import refuse_other_student
from salt_jax.io.model_folder import WAN, Source, part_file, stored_config
from salt_jax.io.shipped import located
from salt_jax.models.latent_size import latent_frames
from salt_jax.models.presets import WanConfig
from salt_jax.pipeline.model import Model
from salt_jax.pipeline.shapes import sampler_of, shapes_model
from salt_jax.pipeline.wan import WanOptions, WanSource, wan_parts
from salt_jax.rollout.settings import RELEASED, RELEASED_KEYS, TEACHER_STEPS, Sampler
from salt_jax.stages.record import is_workdir, read_record
from salt_jax.workdir import Trained, open_exported, open_workdir

WAN_CLIP = (latent_frames(81), 60, 104)  # frames, rows and columns of latent: 832 x 480


def load(
    source: str | AnyPath,
    *,
    folder: str = "",
    released: str = "",
    guidance: float | None = None,
    step: int | None = None,
    tiny_decoder: str | AnyPath = "",
    keeps_text: bool = False,
) -> Model:
    """Opens what makes videos.

    Args:
      source: a workdir of launch.train, a file of launch.export, a folder of launch.convert_wan (a
        teacher of Wan 2.1), a converted few-step student, or the name of a shipped network; gs://
        is read where it is.
      folder: of Wan 2.1: the converted weights that give text encoder and VAE to a student.
      released: what a converted student was trained at, a name of `rollout.settings.RELEASED`.
      guidance: scale of classifier-free guidance; None: 5 for teachers of Wan 2.1, that of its
        config for a teacher of Moving Shapes, and none for students.
      step: of a workdir's checkpoint; None: the newest.
      tiny_decoder: of Wan 2.1: taew2_1.pth of TAEHV, which decodes in place of the VAE, faster and
        not as exactly; videos from text then need no VAE.
      keeps_text: of Wan 2.1: whether the text encoder stays in memory, for prompts that come while
        a video is made, instead of being read from disk for each of them.

    Raises:
      UserError: there is nothing of that kind, or its parts do not fit.
    """
    where, options = str(source), WanOptions(tiny_decoder=str(tiny_decoder), keeps_text=keeps_text)
    path = located(where)
    if is_workdir(where):
        return _of_run(open_workdir(where, step), where, folder, guidance, options)
    if not part_file(WAN, path).is_file():
        raise UserError(
            f"{source} is no workdir, no file of a network and no shipped network; train one with "
            "launch.train, or convert one with launch.convert_wan"
        )
    if (
        path.is_file()
        and read_record(str(path)).config.get("data", {}).get("kind") == "moving_shapes"
    ):
        return _of_run(open_exported(where), where, folder, guidance, options)
    return _converted(where, folder, released, guidance, options)


def _of_run(
    run: Trained, source: str, folder: str, guidance: float | None, options: WanOptions
) -> Model:
    recipe = run.recipe
    if recipe.data.kind == "moving_shapes":
        if tiny := options.tiny_decoder:
            raise UserError(
                f"{tiny} decodes latents of Wan 2.1, and {source} makes Moving Shapes; leave the "
                "tiny decoder out"
            )
        model = shapes_model(run, source)
        if recipe.makes_teacher:
            model.sampler = Sampler(32, recipe.schedule.shift, "euler")
            model.guidance = Teacher().guidance
        model.guidance = model.guidance if guidance is None else guidance
        return model
    clip = (recipe.clip_shape[0], recipe.memory.chunk if recipe.causal else recipe.clip_shape[0])
    found = WanSource(source, Source(folder or recipe.weights), recipe.wan, run=run)
    parts = wan_parts(found, clip, _decoding(options, recipe.wan))
    return Model(
        parts, sampler_of(recipe), recipe.clip_shape, 1.0 if guidance is None else guidance
    )


def _decoding(options: WanOptions, config: WanConfig) -> WanOptions:
    """With a tiny decoder only image to video needs the VAE, which encodes the picture."""
    return options._replace(decodes=not options.tiny_decoder or bool(config.image_dim))


def _converted(
    where: str, folder: str, released: str, guidance: float | None, options: WanOptions
) -> Model:
    config = stored_config(WAN, where)
    shape = (*WAN_CLIP, config.out_channels)
    student = bool(released or folder)
    if released and released not in RELEASED:
        raise UserError(f"released={released!r} is not one of {', '.join(RELEASED)}")
    if released:
        refuse_other_student(part_file(WAN, where), RELEASED_KEYS.get(released, ""), released)
        sampler = RELEASED[released]
    elif student:
        sampler = Sampler(4, 5.0)
    else:
        steps = TEACHER_STEPS[bool(config.image_dim)]
        sampler = Sampler(steps, 5.0, "unipc", stepwise=True)
    chunk = sampler.memory.chunk if sampler.memory else shape[0]
    found = WanSource(where, Source(folder or where), config, student=where if folder else "")
    parts = wan_parts(found, (shape[0], chunk), _decoding(options, config))
    usual = 1.0 if student else 5.0
    return Model(parts, sampler, shape, usual if guidance is None else guidance)
