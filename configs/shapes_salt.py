"""Salt (Eq. 13) on Moving Shapes, from the shipped teacher: a student that works chunk by chunk in 2, 4 or 8 updates.

    python -m launch.train --config=configs/shapes_salt.py --workdir=runs/salt

The same as shapes_self_forcing.py:salt. With the stages before it, as Causal Forcing has them:

    python -m launch.train --config=configs/shapes_teacher_forcing.py --workdir=runs/shapes_teacher_forcing
    python -m launch.train --config=configs/shapes_consistency.py --workdir=runs/shapes_consistency
    python -m launch.train --config=configs/shapes_salt.py --workdir=runs/salt \\
        --config.init_from=runs/shapes_consistency
"""

from configs import shapes_self_forcing


def get_config():
    return shapes_self_forcing.get_config("salt")
