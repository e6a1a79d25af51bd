"""SC-DMD (Salt Eq. 10) for whole clips: what the quickstart runs.

    python -m launch.train --config=configs/sc_dmd.py --workdir=runs/sc_dmd
    python -m launch.train --config=configs/sc_dmd.py:wan --workdir=runs/wan_t2v
    python -m launch.train --config=configs/sc_dmd.py:wan,i2v --workdir=runs/wan_i2v

Variants: `dmd8` is without self-consistency, on the same grid of 8 levels; `dmd4` moreover on the 4
levels that a student of 4 steps visits. `wan` is Wan 2.1 text to video 1.3B, 480p, 81 frames (Salt
App. B, A.1), `wan,i2v` image to video 14B, whose clips are encoded with --image (docs/wan.md).
Neither ever ran at this size; for the cost see launch.plan. On Moving Shapes
`--config.teacher.kind=closed_form` distils the exact optimum instead. Results: docs/results.md.
"""

from configs import base, parts
from salt_jax.keys import Config


def get_config(options: str = "") -> Config:
    size, variants = parts.read_options(options, "dmd8", "dmd4", "i2v")
    c = base.get_config()
    c = whole_clips_of_wan(c) if size == "wan" else parts.at_size(c, size)
    if "i2v" in variants:
        if size != "wan":
            raise ValueError("i2v is a variant of wan: write wan,i2v after the colon")
        c.model.preset = "wan2.1-i2v-14b"
        c.weights = "weights/wan2.1-i2v-14b"
        c.data.dir = "data/wan_i2v"
        c.iterations = 160  # Salt App. B: 800 iterations
        c.sample.num_steps = (2, 4)  # Salt Table 1: 4
    if variants & {"dmd8", "dmd4"}:
        c.loss.self_consistency = 0.0
    if "dmd4" in variants:
        c.schedule.train_levels = 4
    return c


def whole_clips_of_wan(c: Config) -> Config:
    """Salt App. B; backward simulation is off, the training grid that of inference (row 10)."""
    c = parts.wan(c)
    c.batch_size = 16  # Salt App. B
    # "the same" (row 12)
    c.student_optimizer.learning_rate = c.critic_optimizer.learning_rate = 1e-6
    c.teacher.preset = c.teacher.weights = ""  # Salt App. B: the teacher is the model itself
    # Salt App. B: 2,400 iterations, five to one of the student (docs/algorithm.md 9, row 15)
    c.iterations = 480
    return c
