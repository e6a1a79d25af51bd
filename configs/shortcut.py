"""Shortcut self-consistency as the only signal, a baseline that Salt sets beside SC-DMD in Fig. 2.

    python -m launch.train --config=configs/shortcut.py --workdir=runs/shortcut

On whole clips, with the levels and the teacher of sc_dmd.py and no critic. `:wan` after the file's
name is at Wan 2.1 size (--workdir=runs/wan_shortcut). Results: docs/results.md.
"""

from configs import parts, sc_dmd
from salt_jax.keys import Config


def get_config(options: str = "") -> Config:
    size, _ = parts.read_options(options)
    c = sc_dmd.get_config(size)
    c.stage = "shortcut"
    return c
