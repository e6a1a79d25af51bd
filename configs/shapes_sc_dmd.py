"""SC-DMD (Salt Eq. 10) on Moving Shapes: what the quickstart runs.

    python -m launch.train --config=configs/shapes_sc_dmd.py --workdir=runs/sc_dmd

Cost and result: docs/results.md. `--config.teacher.kind=closed_form` distils the exact optimum
instead.
"""

from configs import base


def get_config():
    return base.get_config()
