"""Salt (Eq. 13) on Moving Shapes: a student that works chunk by chunk in 2, 4 or 8 steps.

    python -m launch.train --config=configs/salt.py --workdir=runs/salt

The recipe is configs/self_forcing.py:salt, from the shipped start. How that was made
(salt_jax/assets/README.md), and how to take one's own:

    python -m launch.train --config=configs/teacher_forcing.py --workdir=runs/shapes_teacher_forcing
    python -m launch.train --config=configs/consistency.py --workdir=runs/shapes_consistency
    python -m launch.train --config=configs/salt.py --workdir=runs/salt \\
        --config.init_from=runs/shapes_consistency
"""

from configs import self_forcing


def get_config():
    c = self_forcing.get_config("salt")
    c.init_from = "shapes_causal"
    return c
