"""Every config with its options."""

import importlib


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
