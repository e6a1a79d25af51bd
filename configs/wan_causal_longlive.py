"""LongLive, streaming long tuning at Wan 2.1 size: one video goes on over many updates, and changes
its prompt.

    python -m launch.train --config=configs/wan_causal_longlive.py --workdir=runs/wan_longlive

Starts from runs/wan_longlive_init. `:salt` adds Salt (Eq. 13), `:lora` and `:lora_salt` train
low-rank updates only.
"""

from configs import parts


def get_config(variant: str = "plain"):
    parts.refuse_variant(variant, ("plain", "salt", "lora", "lora_salt"))
    c = parts.wan()
    c.init_from = "runs/wan_longlive_init"
    c.memory.update(window=12, sink=3)  # LL
    c.stream.update(max_frames=240, overlap=3, switch=1.0)  # LL: one switch in each sequence
    c.lora.update(rank=256 * variant.startswith("lora"), alpha=256.0)  # LL
    c.updates = 600  # LL: 3,000 iterations
    c.student_optimizer.learning_rate, c.critic_optimizer.learning_rate = 1e-5, 2e-6  # LL
    c.ema.start = c.updates  # LL: no average with LoRA
    return parts.salt(c, align_start=120) if variant.endswith("salt") else parts.four_updates(c)
