"""Salt (Eq. 13) on Moving Shapes: a student that works chunk by chunk in 2, 4 or 8 updates, from
the shipped start.

    python -m launch.train --config=configs/shapes_salt.py --workdir=runs/salt

The recipe is shapes_self_forcing.py:salt. How the start was made (assets/README.md), and how to
take one's own:

    python -m launch.train --config=configs/shapes_teacher_forcing.py \\
        --workdir=runs/shapes_teacher_forcing
    python -m launch.train --config=configs/shapes_consistency.py --workdir=runs/shapes_consistency
    python -m launch.train --config=configs/shapes_salt.py --workdir=runs/salt \\
        --config.init_from=runs/shapes_consistency
"""

from configs import shapes_self_forcing


def get_config():
    c = shapes_self_forcing.get_config("salt")
    c.init_from = "assets/shapes_causal.safetensors"
    return c
