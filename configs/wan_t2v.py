"""SC-DMD for whole clips of Wan 2.1 text to video 1.3B, 480p, 81 frames (Salt App. B, A.1).

    python -m launch.train --config=configs/wan_t2v.py --workdir=runs/wan_t2v

`:sc_dmd` is the usual one, `:dmd8` and `:dmd4` are the baselines. Clips: of the teacher
(docs/wan.md). Never ran at this size; for the cost see launch.plan.
"""

from configs import parts


def get_config(variant: str = "sc_dmd"):
    parts.refuse_variant(variant, ("sc_dmd", "dmd8", "dmd4"))
    c = parts.whole_clips(parts.wan(), variant)
    c.teacher.preset = c.teacher.weights = ""  # Salt App. B: the teacher is the model itself
    # Salt App. B: 2,400 iterations, five to one of the student (docs/algorithm.md 9, row 15)
    c.updates = 480
    return c
