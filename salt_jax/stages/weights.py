"""The parameters that a run starts from: what the weights name, the teacher, and the student of the
stage before.
"""

import functools
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, fields, replace

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jax.typing import DTypeLike

from salt_jax.checkpoint_files import newest_step
from salt_jax.config.migrate import flat
from salt_jax.config.reading import from_json, read_workdir
from salt_jax.config.schema import MAKES_TEACHER, Recipe
from salt_jax.errors import UserError
from salt_jax.io.model_folder import CRITIC, VAE, WAN, Part, Source, open_part, part_file
from salt_jax.io.shipped import located
from salt_jax.io.tensor_files import load_weights
from salt_jax.models.lora import merge
from salt_jax.models.presets import WanConfig
from salt_jax.models.text_encoder import init_text_encoder
from salt_jax.models.vae import PRESETS as VAE_PRESETS
from salt_jax.models.vae import VAEConfig, init_vae
from salt_jax.models.wan import init_wan
from salt_jax.moving_shapes import shapes
from salt_jax.moving_shapes.every_clip import every_clip, sizes
from salt_jax.moving_shapes.exact import closed_form_params
from salt_jax.moving_shapes.shapes import World
from salt_jax.sharding import state_shardings
from salt_jax.stages.record import is_workdir, read_record, same_file
from salt_jax.stages.roles import refuse_another_base
from salt_jax.stages.stage import ABSENT, CLOSED_FORM, NO_TEACHER, Stage, Weights
from salt_jax.stages.texts import Texts, read_texts
from salt_jax.types import Params

CHUNKS = ("memory.chunk", "memory.first")


def initial_weights(recipe: Recipe, mesh: Mesh, dtype: DTypeLike | None = jnp.float32) -> Params:
    """{"wan", "text_encoder"}: from the file or folder that the recipe names, or fresh, cut over
    the mesh.

    Of kind latents "wan" alone: the texts are embedded already. `dtype` None is as stored.

    Raises:
      UserError: what is there is absent, damaged, or of another network.
    """
    if recipe.data.kind == "latents":
        return {"wan": open_wan(recipe, recipe.weights, mesh, dtype)}

    def fresh():
        k_wan, k_text = jax.random.split(jax.random.key(recipe.seed))
        return {
            "wan": init_wan(k_wan, recipe.wan),
            "text_encoder": init_text_encoder(k_text, recipe.text),
        }

    like = jax.eval_shape(fresh)
    shardings = state_shardings(mesh, like)
    if not recipe.weights:
        return jax.jit(fresh, out_shardings=shardings)()
    return load_weights(located(recipe.weights), like, dtype, shardings)


def open_wan(
    recipe: Recipe,
    where: str,
    mesh: Mesh,
    dtype: DTypeLike | None,
    part: Part[WanConfig] = WAN,
) -> Params:
    """The transformer in a folder or file of launch.convert_wan; "" is a fresh one.

    Raises:
      UserError: it is absent, damaged, or of other sizes than the recipe's.
    """
    place = functools.partial(state_shardings, mesh)
    config, wan = open_part(part, Source(where, recipe.seed), recipe.wan, dtype, place)
    if config != recipe.wan:
        raise UserError(
            f"the weights in {where} are {config}, not {recipe.wan}; "
            "check the presets and weights of config.model and config.teacher, and config.init_from"
        )
    return wan


def vae_sizes(recipe: Recipe) -> VAEConfig:
    """Of the VAE that goes with a network, where its file is not read."""
    return VAE_PRESETS["tiny" if recipe.model.preset.endswith("tiny") else "wan2.1"]


def open_vae(recipe: Recipe, mesh: Mesh) -> Params:
    """The VAE beside the weights, in the type of matrix products; a fresh one where they are.

    Raises UserError where it is absent or damaged.
    """
    place = lambda like: state_shardings(mesh, {"vae": like})["vae"]
    source, sizes = Source(recipe.weights, recipe.seed), vae_sizes(recipe)
    if recipe.weights and not (file := part_file(VAE, recipe.weights)).is_file():
        raise UserError(
            f"config.stream.reencode={recipe.stream.reencode} decodes with the VAE, and there is "
            f"no {file}; convert the whole model with launch.convert_wan, or set it to 0"
        )
    _, vae = open_part(VAE, source, sizes, recipe.compute.dtype, place)
    return in_dtype(vae, recipe.model.dtype)


def teacher_weights(recipe: Recipe, base: Params, mesh: Mesh) -> Params:
    """The network that is distilled: the weights, or another one's; in `config.teacher.dtype`."""
    t = recipe.teacher
    if not t.weights and recipe.teacher_wan == recipe.wan:
        return in_dtype(base, t.dtype)
    model = replace(recipe.model, preset=t.preset or recipe.model.preset)
    another = replace(recipe, weights=t.weights, model=model, seed=recipe.seed + 1)
    read_as = None if t.dtype == "stored" else jnp.dtype(t.dtype)
    return in_dtype(initial_weights(another, mesh, read_as)["wan"], t.dtype)


def in_dtype(params: Params, dtype: str) -> Params:
    """The same parameters; those of this dtype are the same arrays, and all are if `dtype` is
    "stored".
    """
    if dtype == "stored":
        return params
    return jax.tree.map(lambda x: x if x.dtype == jnp.dtype(dtype) else x.astype(dtype), params)


def student_start(recipe: Recipe, base: Params, mesh: Mesh) -> Params:
    """Where the student starts: the averaged network of the stage before, from its workdir or file,
    or the weights.

    Of Wan 2.1 also a converted network, such as a causal start that others have trained. A workdir
    of a LoRA is merged into what it adapts; a file of launch.export is whole already.

    Raises:
      UserError: what `config.init_from` names was made for another network, text encoder, data or
        chunks.
    """
    where, key = recipe.init_from, f"config.init_from={recipe.init_from}"
    if not where:
        return base
    record, file = read_record(where), located(where)
    if recipe.data.kind == "latents" and part_file(WAN, where).is_file():
        causal = recipe.causal and record.sees == "causal" and "memory" in record.config
        _refuse_difference(key, flat(record.config), recipe, CHUNKS if causal else ())
        return open_wan(recipe, where, mesh, jnp.float32)
    exported = file.is_file()
    if not exported and not (file / "config.json").is_file():
        raise UserError(
            f"{key} is neither the workdir of a stage (with its config.json) nor a file of "
            "launch.export or a "
            "folder of launch.convert_wan; name one of these"
        )
    if exported and not record.config:
        raise UserError(f"{key} has no config in it; name a file of launch.export")
    if record.config.get("stage") in MAKES_TEACHER:
        how = "name it" if exported else "write it to a file with launch.export and name that"
        raise UserError(
            f"{key} holds a teacher, where every student starts; {how} in config.weights"
        )
    before = from_json(json.dumps(record.config), file) if exported else read_workdir(where)
    same = ["model.preset", "text_encoder", "data.kind", "data.clip"]
    same += [f"world.{f.name}" for f in fields(World)]
    same += CHUNKS if before.causal else ()
    same += [] if same_file(before.weights, recipe.weights) else ["weights"]
    _refuse_difference(key, flat(asdict(before)), recipe, same)
    if exported:
        text = jax.eval_shape(lambda: init_text_encoder(jax.random.key(0), recipe.text))
        like = {"wan": base, "text_encoder": text}
        return load_weights(file, like, shardings=state_shardings(mesh, like))["wan"]
    from salt_jax.checkpoint import restore_params  # here, because files are read without Orbax

    average = restore_params(where, "ema", mesh, newest_step(where))
    if not before.lora.rank:
        return average
    refuse_another_base(where, before)
    return merge(student_start(before, base, mesh), average, before.lora)


def critic_start(recipe: Recipe, base: Params, mesh: Mesh) -> Params:
    """Where the critic starts: the weights, or with `config.init_critic` the critic of the stage
    before, which `student_start` has found to fit.

    That of a LoRA is merged into what it adapts. Beside a converted student it is
    critic.safetensors.

    Raises:
      UserError: the stage before has no critic.
    """
    where = recipe.init_from
    if not recipe.init_critic:
        return base
    if recipe.data.kind == "latents" and part_file(CRITIC, where).is_file():
        return open_wan(recipe, where, mesh, jnp.float32, CRITIC)
    before = read_workdir(where) if is_workdir(where) else None
    if before is None or before.stage != "distil":
        why = f"is of stage {before.stage} and has none" if before else "is a student alone"
        raise UserError(
            f"config.init_critic=True takes the critic of config.init_from={where}, which {why}; "
            "name the workdir of a distillation, put a converted critic (launch.convert_wan "
            f"--key=critic) beside the student as {CRITIC.file}, or set config.init_critic=False"
        )
    from salt_jax.checkpoint import restore_params

    critic = restore_params(where, "critic", mesh, newest_step(where))
    if not before.lora.rank:
        return critic
    refuse_another_base(where, before, "critic")
    return merge(critic_start(before, base, mesh), critic, before.lora)


def _refuse_difference(
    key: str, before: Mapping[str, object], recipe: Recipe, names: Sequence[str]
) -> None:
    here = flat(asdict(recipe))
    for name in names:
        if before.get(name) != here[name]:
            raise UserError(
                f"{key} was made with {name}={before.get(name)}, this run has {here[name]}; "
                "make them equal or start from another stage"
            )


def load(stage: Stage, mesh: Mesh) -> tuple[Weights, Texts]:
    """Everything that a run begins with, and its texts as the networks read them.

    Raises:
      UserError: weights, data or the stage before do not fit, or the closed form has too many
        clips.
    """
    recipe = stage.recipe
    loaded = initial_weights(recipe, mesh)
    base, text_encoder = loaded["wan"], loaded.get("text_encoder")
    texts = read_texts(stage, text_encoder)
    start = base if "tokens" in stage.needs else student_start(recipe, base, mesh)
    source = dict(stage.parts()).get("teacher", NO_TEACHER)
    if source == CLOSED_FORM:
        teacher = closed_form(recipe, texts.encode_caption)
    else:
        teacher = None if source == NO_TEACHER else teacher_weights(recipe, base, mesh)
    critic = critic_start(recipe, base, mesh) if recipe.init_critic else ABSENT
    vae = open_vae(recipe, mesh) if recipe.reencodes else ABSENT
    paired = "switch" in stage.needs and texts.records and "switch" in texts.records[0]
    switch = texts.null_text if paired else ABSENT
    found = base, text_encoder, start, teacher, texts.null_text, critic, vae, switch
    return Weights(*found), texts


def fresh(stage: Stage) -> Weights:
    """The same from random weights: in form what `load` reads, for planners (`jax.eval_shape`).

    A teacher of its own weights that stays as it is stored is taken to be float32.
    """
    recipe, t = stage.recipe, stage.recipe.teacher
    k_base, k_other = jax.random.split(jax.random.key(recipe.seed))
    base = init_wan(k_base, recipe.wan)
    tokens = "tokens" in stage.needs
    null_text = jnp.zeros((1, recipe.wan.text_length, 1 if tokens else recipe.wan.text_dim))
    source = dict(stage.parts()).get("teacher", NO_TEACHER)
    if source == CLOSED_FORM:
        captions = jnp.zeros((len(shapes.scenes(recipe.world)), *null_text.shape[1:]))
        dtypes = {"clips": jnp.float32, "frames": jnp.float32, "paths": jnp.int32}
        teacher = {n: jnp.zeros(size, dtypes[n]) for n, size in sizes(recipe.world).items()}
        teacher["captions"] = captions
    elif source == NO_TEACHER:
        teacher = None
    elif t.weights or recipe.teacher_wan != recipe.wan:
        teacher = in_dtype(init_wan(k_other, recipe.teacher_wan), t.dtype)
    else:
        teacher = in_dtype(base, t.dtype)
    critic = base if recipe.init_critic else ABSENT
    text_encoder = init_text_encoder(k_other, recipe.text)
    vae = init_vae(k_other, vae_sizes(recipe)) if recipe.reencodes else ABSENT
    vae = in_dtype(vae, recipe.model.dtype)
    return Weights(base, text_encoder, base, teacher, null_text, critic, vae)


def closed_form(recipe: Recipe, encode: Callable[[str], np.ndarray]) -> Params:
    """All clips of the world by caption, for the closed-form denoiser.

    Raises:
      UserError: the pair world, whose clips are too many.
    """
    world = recipe.world
    if world.pair:
        raise UserError(
            "config.world.pair has too many clips for the closed form; set "
            "config.teacher.kind=network"
        )
    captions = [encode(shapes.caption(scene)) for scene in shapes.scenes(world)]
    # tokens stand for the caption as one number a row
    rows = [row[:, None].astype(np.float32) if row.ndim == 1 else row for row in captions]
    return closed_form_params(every_clip(world), np.stack(rows))
