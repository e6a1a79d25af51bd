"""The shipped teacher for Moving Shapes, with its text encoder.

    python -m launch.train --config=configs/shapes_teacher.py --workdir=runs/teacher

Its target is the closed-form optimum, not a sample: the minimiser is the same, the gradient is quieter.
Cost and result: assets/README.md.
"""

from configs import base


def get_config():
    c = base.get_config()
    c.stage = "denoising"
    c.weights = ""
    c.updates = 6000
    c.batch_size = 64
    c.teacher.kind = "closed_form"
    c.teacher.guidance = 1.0
    c.view.update(shift=8.0, lowest=0.02, highest=1.0)
    c.student_optimizer.update(learning_rate=2e-3, warmup=200, decay=True, b1=0.9, b2=0.99, clip=1.0)
    c.ema.update(decay=0.998, start=200)
    c.log_every = 50
    c.save_every = 500
    return c
