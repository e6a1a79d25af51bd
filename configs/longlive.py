"""LongLive, streaming long tuning: one video continues over many updates, and changes its prompt.

    python -m launch.train --config=configs/longlive.py --workdir=runs/shapes_longlive

Starts from runs/shapes_longlive_init. After a colon behind the file's name `salt` adds Salt (Eq.
13), `paper` or `release` as configs/self_forcing.py has it, `lora` trains low-rank adapters only,
`wan` is at Wan 2.1 size (--workdir=runs/wan_longlive), `long` in the long world.
"""

from configs import parts


def get_config(options: str = ""):
    size, variants = parts.read_options(options, "salt", "lora", *parts.READINGS)
    c = parts.causal(size)
    c.init_from = f"runs/{size}_longlive_init"
    c.init_critic = True  # LL: `critic` of the first stage's checkpoint
    lora = 256 if size == "wan" else 16  # LL
    c.lora.update(rank=lora * ("lora" in variants), alpha=float(lora))
    # LL has 12 and 3 in clips of 21 frames; those of Moving Shapes have 9
    c.memory.update(window=9 if size == "shapes" else 12, sink=3)
    c.stream.update(max_frames=45, overlap=3, switch=0.5)  # LL: 240, 3
    if size == "long":
        c.stream.max_frames = 84
    if size == "wan":
        c.stream.update(max_frames=240, overlap=3, switch=1.0)  # LL: one switch in each sequence
        c.stream.reencode = 19  # LL: of its last 21 latents and the 18 new ones all but 20
        c.iterations = 600  # LL: 3,000 iterations
        c.student_optimizer.learning_rate, c.critic_optimizer.learning_rate = 1e-5, 2e-6  # LL
        c.ema.start = c.iterations  # LL: no average with LoRA
    if "salt" in variants:
        return parts.salt(c, size, variants, parts.Released(start=240, noise="euler_between"))
    return parts.four_steps(c)
