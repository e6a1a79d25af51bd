"""Every config with its options."""

import importlib

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
    "self_forcing": [
        "",
        "naive",
        "mixed",
        "mixed_sc",
        "salt",
        "long",
        "long,salt",
        "wan",
        "wan,salt",
    ],
    "causal_forcing": [
        size + variant
        for size in ("shapes", "wan")
        for variant in ("", ",salt", ",frame", ",frame,salt", ",two", ",one")
    ],
    "causvid": ["", "salt", "wan", "wan,salt"],
    "longlive_init": ["", "salt", "long", "wan", "wan,salt"],
    "longlive": [
        size + variant
        for size in ("shapes", "long", "wan")
        for variant in ("", ",salt", ",lora", ",lora,salt")
    ],
    "salt": [None],
}
CASES = [(name, options) for name, several in OPTIONS.items() for options in several]
WAN = [case for case in CASES if "wan" in (case[1] or "")]


def load(name):
    return importlib.import_module(f"configs.{name}")


def get_config(name, options):
    """The ConfigDict; `options` None: the config takes none."""
    return load(name).get_config(*[] if options is None else [options])
