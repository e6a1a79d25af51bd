"""What launch.sample does with Wan 2.1: a teacher by many guided updates, or a student by a few, whole clips or chunk
by chunk, from text or from a picture. The weights are a folder of launch.convert_wan; see docs/wan.md.
"""

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, get_args

import jax
import jax.numpy as jnp
import numpy as np
from absl import flags
from PIL import Image
from tqdm import tqdm

from launch.common import FPS, Trained, all_devices, read_memory, read_size
from salt_jax.errors import UserError
from salt_jax.flow.multistep import TeacherSolver
from salt_jax.models import pretrained
from salt_jax.models.denoiser import Network, guided, wan_network
from salt_jax.models.image_condition import (
    condition_latents,
    crop_for_clip,
    fit_size,
    image_clip,
    squash_for_clip,
)
from salt_jax.models.image_encoder import encode_image
from salt_jax.models.kv_cache import CachePolicy
from salt_jax.models.presets import PRESETS, Compute, WanConfig
from salt_jax.models.pretrained import IMAGE, TEXT, VAE, WAN, Source
from salt_jax.models.prompts import negative_prompt
from salt_jax.models.vae import SPACE, TIME, encode_video
from salt_jax.rollout.parallel import Solver
from salt_jax.sample import Cue, multistep_clip, sample_clips, stream_chunks, stream_pixels
from salt_jax.train.sharding import state_shardings
from salt_jax.types import ImageText, Params, Told
from salt_jax.video import write_mp4

FRAMES, STUDENT_UPDATES = 81, 4  # usual ones
TEACHER_UPDATES = {False: 50, True: 40}  # by whether the model reads pictures: Wan 2.1's own

WEIGHTS = flags.DEFINE_string(
    "weights", None, "a folder of launch.convert_wan, instead of --workdir or with it"
)
MODEL = flags.DEFINE_string("model", None, "the preset that the weights must be of, such as wan2.1-t2v-1.3b")
PRESET_SIZE = flags.DEFINE_enum(
    "preset_size", "full", ["full", "tiny"], "tiny: --model made small, with random weights and no --weights"
)
STUDENT = flags.DEFINE_string("student", None, "a converted few-step model; --weights gives the other parts")
CHUNK = flags.DEFINE_integer(
    "chunk", 0, "latent frames that a converted student makes together; 0: all", lower_bound=0
)
SIZE = flags.DEFINE_string("size", "832x480", "WIDTHxHEIGHT of Wan's videos; with --image their area")
GUIDANCE = flags.DEFINE_float(
    "guidance", None, "w of u + w (c - u); default 5, for students 1, which is none"
)
SHIFT = flags.DEFINE_float(
    "shift", None, "of the noise levels; default as in the config, or 5", lower_bound=0.0
)
NEGATIVE = flags.DEFINE_string("negative_prompt", None, "what guidance leads away from; default Wan's own")
PICTURE = flags.DEFINE_string("image", None, "the first frame")
PICTURE_FIT = flags.DEFINE_enum(
    "image_fit", "squash", ["squash", "crop"], "how CLIP sees it: as in Wan's code, or as in diffusers"
)
DTYPE = flags.DEFINE_enum(
    "dtype", "bfloat16", ["bfloat16", "float32"], "of all but the VAE, which is float32"
)
TILE = flags.DEFINE_integer(
    "tile", 0, "decode in tiles of so many latent rows, to save memory; 0: whole", lower_bound=0
)


class Ask(NamedTuple):
    """One video."""

    file: Path
    prompt: str
    key: jax.Array  # [1], all its noise
    num_updates: int


class Model(NamedTuple):
    """What makes videos: `params` and the other parts are read when they are needed."""

    source: Source  # of text encoder, VAE and image encoder
    config: WanConfig
    params: Callable[[], Params]
    student: bool
    policy: CachePolicy | None  # None: whole clips
    first_updates: int  # of the first chunk; 0: as the others
    shape: tuple[int, int, int, int]  # F, H, W, C of a latent clip
    solver: Any
    num_updates: list[int]
    shift: float
    guidance: float


def open_model(run: Trained | None, solver: str | None, frames: int | None, memory: str | None) -> Model:
    """The flags as values that fit together; `run` is a student that launch.train made, or None.

    Raises:
      UserError: they do not fit.
    """
    if run:
        return _trained(run, solver, frames, memory)
    tiny, model = PRESET_SIZE.value == "tiny", MODEL.value
    if tiny == bool(WEIGHTS.value):
        raise UserError(
            "name what makes the videos: --workdir=DIR, --weights=DIR or --preset_size=tiny --model=NAME"
        )
    if tiny and not model:
        raise UserError("--preset_size=tiny makes a model small; name it, such as --model=wan2.1-t2v-1.3b")
    source = Source(WEIGHTS.value or "")
    if tiny:
        config = PRESETS[pretrained.tiny_preset(model or "")]
    else:
        config = pretrained.stored_config(WAN, source.folder)
        if model and PRESETS.get(model) != config:
            raise UserError(
                f"--weights={WEIGHTS.value} is not --model={model} but {config}; name its own, or none"
            )
    refuse_picture(config, bool(CHUNK.value))
    student, place = bool(STUDENT.value or CHUNK.value), partial(state_shardings, all_devices())
    where = Source(STUDENT.value or source.folder)

    def params():
        found, tree = pretrained.open_part(WAN, where, config, shardings=place)
        if found != config:
            raise UserError(
                f"--student={STUDENT.value} is {found}, --weights is {config}; give those it came from"
            )
        return tree

    policy = None
    if CHUNK.value:
        policy = CachePolicy(CHUNK.value, 1 if PICTURE.value else CHUNK.value, 0, 0, "absolute")
    return Model(
        source,
        config,
        params,
        student,
        read_memory(memory, policy) if policy and memory else policy,
        0,
        latent_shape(frames or FRAMES, config),
        _known(solver, student),
        [STUDENT_UPDATES if student else TEACHER_UPDATES[bool(config.image_dim)]],
        SHIFT.value or 5.0,
        (1.0 if student else 5.0) if GUIDANCE.value is None else GUIDANCE.value,
    )


def _trained(run: Trained, solver: str | None, frames: int | None, memory: str | None) -> Model:
    r = run.recipe
    refuse_picture(r.wan, r.causal and r.memory.first == 1)
    source = Source(WEIGHTS.value or r.weights)
    if not source.folder and r.wan.text_dim != pretrained.TINY[TEXT].dim:
        raise UserError("name the text encoder and the VAE: --weights=DIR of launch.convert_wan")
    length = latent_shape(frames, r.wan)[0] if frames else r.clip_shape[0]
    policy = r.memory if r.causal else None
    return Model(
        source,
        r.wan,
        lambda: run.params,
        True,
        read_memory(memory, policy) if policy and memory else policy,
        r.rollout.first_updates,
        (length, *r.clip_shape[1:]),
        _known(solver or r.sample.solver, True),
        list(r.sample.num_updates),
        SHIFT.value or r.schedule.shift,
        1.0 if GUIDANCE.value is None else GUIDANCE.value,
    )


def refuse_picture(config: WanConfig, goes_on: bool) -> None:
    """Raises UserError where --image is asked for and not given, or given to a model that cannot use it.

    `goes_on`: the model makes videos chunk by chunk, and may start from a picture without reading it.
    """
    if bool(config.image_dim) != bool(PICTURE.value) and not (goes_on and PICTURE.value):
        raise UserError(
            "this model needs --image=FILE" if config.image_dim else "--image is for models that read it"
        )


def _known(solver: str | None, student: bool) -> str:
    solvers = get_args(Solver) if student else get_args(TeacherSolver)
    if solver and solver not in solvers:
        raise UserError(
            f"--solver={solver} is not for {'students' if student else 'teachers'}: {', '.join(solvers)}"
        )
    return solver or ("cm" if student else "unipc")


def latent_shape(frames: int, config: WanConfig) -> tuple[int, int, int, int]:
    """(F, H, W, C) of the clip that --size and --frames ask for; a picture says the ratio of its sides."""
    columns, rows = read_size(SIZE.value, frames)
    if PICTURE.value:
        try:
            height, width = read_image(PICTURE.value).shape[:2]
            rows, columns = fit_size(height, width, rows * columns)
        except ValueError as error:
            raise UserError(f"{error} (--image, --size)") from error
    return 1 + frames // TIME, rows // SPACE, columns // SPACE, config.out_channels


def read_image(path: str) -> np.ndarray:
    """uint8 [H, W, 3]. Raises UserError if there is no picture."""
    try:
        with Image.open(path) as file:
            return np.asarray(file.convert("RGB"))
    except OSError as error:
        raise UserError(f"cannot read the picture {path} ({error}); check --image") from error


def make_videos(model: Model, asked: Sequence[Ask]) -> None:
    """Writes every video that is not there yet."""
    asked = [ask for ask in asked if not ask.file.exists()]
    if not asked:
        return
    texts, null = read_texts(model, [ask.prompt for ask in asked])
    image, given = read_picture(model)
    make = maker(model, null, given)
    config, params = pretrained.open_part(VAE, model.source)
    updates = sum(1 if model.student else ask.num_updates for ask in asked)
    with tqdm(total=updates, desc="videos" if model.student else "updates") as bar:
        for ask in asked:
            text = jnp.asarray(texts[ask.prompt])
            chunks = make(ask, ImageText(text, *image) if image else text, bar.update)
            pixels = stream_pixels(params, config, chunks, jnp.float32, TILE.value)
            write_mp4(ask.file, np.concatenate([frames[0] for frames in pixels]), 1, FPS)


def read_texts(model: Model, prompts: Sequence[str]) -> tuple[dict[str, np.ndarray], jax.Array]:
    """The embedding of each prompt, [1, T, D], and that of the negative one."""
    negative = negative_prompt(NEGATIVE.value, bool(model.config.image_dim))
    names = list(dict.fromkeys([*prompts, negative]))
    rows = pretrained.embed_prompts(model.source, names, model.config.text_length, jnp.dtype(DTYPE.value))
    texts = {name: row[None] for name, row in zip(names, rows, strict=True)}
    return texts, jnp.asarray(texts[negative])


def read_picture(model: Model) -> tuple[Any, np.ndarray | None]:
    """(features, condition) for a network that reads pictures, or a first latent frame to go on from, or neither."""
    if not PICTURE.value:
        return None, None
    image, (height, width) = read_image(PICTURE.value), (SPACE * n for n in model.shape[1:3])
    frames = 1 if model.policy else TIME * (model.shape[0] - 1) + 1
    config, params = pretrained.open_part(VAE, model.source)
    clip = jnp.asarray(image_clip(image, frames, height, width))[None]
    latents = jax.jit(encode_video, static_argnums=(2, 3))(params, clip, config, jnp.float32)
    if model.policy:
        return None, np.asarray(latents)
    config, params = pretrained.open_part(IMAGE, model.source)
    fit = {"squash": squash_for_clip, "crop": crop_for_clip}[PICTURE_FIT.value]
    pixels = jnp.asarray(fit(image, config.image_size))[None]
    see = jax.jit(encode_image, static_argnums=(2, 3))
    features = see(params, pixels, config, jnp.dtype(DTYPE.value)).astype(jnp.float32)
    return (features, condition_latents(latents)), None


def maker(model: Model, null: jax.Array, given: np.ndarray | None) -> Callable[..., Iterator[np.ndarray]]:
    """(what is asked, what the network is told, progress) -> latents, chunk by chunk, [1, f, H, W, C]."""
    config, shape, policy, shift, solver = model.config, model.shape, model.policy, model.shift, model.solver
    network: Network = wan_network(
        config, Compute(jnp.dtype(DTYPE.value)), shape[0], policy.chunk if policy else shape[0]
    )
    params = model.params()
    network = network._replace(denoise=guided(network.denoise, null, model.guidance))

    def make(ask: Ask, told: Told, report: Callable) -> Iterator[np.ndarray]:
        if policy:
            how = (ask.key, ask.num_updates, shift, solver, shape, policy, model.first_updates, given)
            yield from stream_chunks(network, params, {0: Cue(np.asarray(told))}, *how)
        elif model.student:
            yield from sample_clips(
                network.denoise, params, told, ask.key, ask.num_updates, shift, solver, shape, 1
            )
        else:
            yield multistep_clip(
                network.denoise, params, told, ask.key, ask.num_updates, shift, solver, shape, report
            )
        if model.student:
            report()

    return make
