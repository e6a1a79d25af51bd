"""DMD-4: no self-consistency, and a training grid of the 4 levels that a 4-update student visits.

python -m launch.train --config=configs/shapes_dmd4.py --workdir=runs/dmd4
"""

from configs import base


def get_config():
    c = base.get_config()
    c.schedule.train_updates = 4
    c.loss.self_consistency = 0.0
    return c
