"""LongLive, streaming long tuning: one video goes on over many updates, and changes its prompt.

    python -m launch.train --config=configs/shapes_longlive.py --workdir=runs/shapes_longlive

Starts from runs/shapes_longlive_init. `:salt` adds Salt (Eq. 13), `:lora` and `:lora_salt` train
low-rank updates only.
"""

from configs import parts


def get_config(variant: str = "plain"):
    parts.refuse_variant(variant, ("plain", "salt", "lora", "lora_salt"))
    c = parts.shapes()
    c.init_from = "runs/shapes_longlive_init"
    c.memory.update(window=9, sink=3)
    c.stream.update(max_frames=45, overlap=3, switch=0.5)  # LL: 240, 3
    c.lora.update(rank=16 * variant.startswith("lora"), alpha=16.0)
    return parts.salt(c, align_start=20) if variant.endswith("salt") else parts.four_updates(c)
