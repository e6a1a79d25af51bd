"""Every config with its options."""

import dataclasses
import importlib

from salt_jax.config.schema import Recipe


def each_reading(*variants):
    """Salt with these, by the paper and by the authors' code: by size one of the two by default."""
    shapes = ["shapes" + v + ",salt" + r for v in variants for r in ("", ",release")]
    return [*shapes, *(f"wan{v},salt" for v in variants), "wan,salt,paper"]


# Every config with what may stand after the colon, alone and together.
OPTIONS = {
    "base": [None],
    "sc_dmd": [
        "",
        "dmd8",
        "dmd4",
        *("wan" + i2v + v for i2v in ("", ",i2v") for v in ("", ",dmd8", ",dmd4")),
    ],
    "teacher": ["", "long"],
    "teacher_forcing": ["", "frame", "long", "wan", "wan,frame"],
    "ode_regression": ["", "frame", "long", "wan", "wan,frame", "wan,causvid", "wan,causvid,salt"],
    "consistency": ["", "frame", "long", "wan", "wan,frame"],
    "shortcut": ["", "wan"],
    "self_forcing": ["", "naive", "naive,release", "mixed", "mixed_sc", "long", "wan", "wan,naive"]
    + ["mixed_sc,release", "wan,mixed,paper", *each_reading("")],
    "causal_forcing": [
        size + variant for size in ("shapes", "wan") for variant in ("", ",frame", ",two", ",one")
    ]
    + each_reading("", ",frame"),
    "causvid": ["", "wan", *each_reading("")],
    "longlive_init": ["", "long", "wan", *each_reading("")],
    "longlive": [size + lora for size in ("shapes", "long", "wan") for lora in ("", ",lora")]
    + each_reading("", ",lora"),
    "salt": [None],
}
CASES = [(name, options) for name, several in OPTIONS.items() for options in several]
WAN = [case for case in CASES if "wan" in (case[1] or "")]


def load(name):
    return importlib.import_module(f"configs.{name}")


def get_config(name, options):
    """The ConfigDict; `options` None: the config takes none."""
    return load(name).get_config(*[] if options is None else [options])


def form(recipe: Recipe, program: str) -> str:
    """What a program of this name depends on: not how much a term weighs, nor at which levels, from
    which files or in how many blocks of a network features are taken.
    """
    told = dataclasses.asdict(recipe) | {"clip": recipe.clip_shape}
    for name in (
        *("init_from", "weights", "data", "seed", "iterations", "critic_ratio", "batch_size"),
        *("student_optimizer", "critic_optimizer", "ema", "schedule", "renoise", "ode", "sample"),
        *("log_every", "save_every", "keep"),
    ):
        del told[name]
    del told["rollout"]["num_steps"], told["rollout"]["probabilities"], told["stream"]["switch"]
    del told["teacher"]["weights"], told["teacher"]["guidance"]
    align, loss = told.pop("align"), told.pop("loss")
    if "alignment" in program:
        told["align"] = [align[k] for k in ("network", "reference_exit", "reference_noise")]
    if "self_consistency" in program:
        told["stop_gradient"] = loss["stop_gradient"]
    if program.startswith("critic"):
        del told["teacher"]
    return f"{program} {told}"
