"""DMD-8: SC-DMD without self-consistency, on the same grid of 8 levels.

python -m launch.train --config=configs/shapes_dmd8.py --workdir=runs/dmd8
"""

from configs import base


def get_config():
    c = base.get_config()
    c.loss.self_consistency = 0.0
    return c
