"""SC-DMD for whole clips of Wan 2.1 image to video 14B, 480p, 81 frames (Salt App. B, A.1).

    python -m launch.train --config=configs/wan_i2v.py --workdir=runs/wan_i2v

`:sc_dmd` is the usual one, `:dmd8` and `:dmd4` are the baselines. Clips: real ones or the
teacher's, encoded with --image (docs/wan.md). Never ran at this size; for the cost see launch.plan.
"""

from configs import parts


def get_config(variant: str = "sc_dmd"):
    parts.refuse_variant(variant, ("sc_dmd", "dmd8", "dmd4"))
    c = parts.whole_clips(parts.wan(), variant)
    c.model.preset = "wan2.1-i2v-14b"
    c.weights = "weights/wan2.1-i2v-14b"
    c.data.dir = "data/wan_i2v"
    c.teacher.preset = c.teacher.weights = ""  # Salt App. B: the teacher is the model itself
    # Salt App. B: 800 iterations, five to one of the student (docs/algorithm.md 9, row 15)
    c.updates = 160
    c.sample.num_updates = (2, 4)  # Salt Table 1: 4
    return c
