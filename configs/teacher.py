"""The shipped kind of teacher for Moving Shapes, with its text encoder: first motion, then
everything.

    python -m launch.train --config=configs/teacher.py --workdir=runs/teacher_1
    python -m launch.export --workdir=runs/teacher_1 --dst=runs/teacher_1.safetensors
    python -m launch.train --config=configs/teacher.py --workdir=runs/teacher_2 \\
        --config.weights=runs/teacher_1.safetensors --config.renoise.shift=4 \\
        --config.iterations=7000 --config.ema.decay=0.997 \\
        --config.student_optimizer.learning_rate=1.5e-3 --config.student_optimizer.warmup=50

Small batches suffice: the target is the closed-form optimum, not a sample, with the same minimiser
and less variance in the gradient. The direction of motion is decided at high noise and learnt last,
so the first run trains at high noise. Cost and result:
salt_jax/assets/README.md. `:long` after the file's name is for the long world; launch/long_world.sh
has both runs.
"""

from configs import base, parts


def get_config(options: str = ""):
    size, _ = parts.read_options(options)
    c = parts.at_size(base.get_config(), size)
    c.stage = "denoising"
    c.weights = ""
    c.iterations = 8000
    c.batch_size = 16
    c.teacher.kind = "closed_form"
    c.renoise.update(shift=20.0, lowest=0.02, highest=1.0)
    c.student_optimizer.update(
        learning_rate=2e-3, warmup=100, decay=True, b1=0.9, b2=0.99, clip=1.0
    )
    c.ema.update(decay=0.99, start=50)
    c.log_every = 100
    c.save_every = 500
    if size == "long":  # without decay, so that the run may be made longer
        c.batch_size, c.iterations = 8, 12000
        c.student_optimizer.update(learning_rate=1e-3, decay=False)
        c.ema.decay = 0.997
        c.log_every, c.save_every_minutes = 50, 10.0
    return c
