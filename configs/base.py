"""Every key there is, with its unit. Other configs are deltas of this one; an unknown key is an error.

Numbers are the shapes world's (two CPU cores). Where the Salt paper is silent the comment says where a value is from.
"""

from typing import Any

import ml_collections


def optimizer(learning_rate: float, warmup: int = 0, decay: bool = False):
    return ml_collections.ConfigDict(
        dict(
            learning_rate=learning_rate,
            warmup=warmup,  # updates, linear
            decay=decay,  # cosine to 0 over the run; constant if False
            b1=0.0,  # DMD's betas are (0, 0.999) in all peers
            b2=0.999,
            eps=1e-8,
            weight_decay=0.01,
            clip=10.0,  # global norm of the gradient
        )
    )


def get_config() -> Any:  # a ConfigDict; its attributes are not known to a type checker
    c = ml_collections.ConfigDict()
    c.stage = "distil"  # "distil" a student, or "denoising": train a teacher and its text encoder on data
    c.seed = 0
    c.updates = 60  # student updates in the whole run; peers count critic updates, five times as many
    c.batch_size = 24  # clips, over all devices

    c.model = ml_collections.ConfigDict(
        dict(
            preset="tiny",  # student, critic and teacher: tiny, small, wan2.1-t2v-1.3b, wan2.1-t2v-14b
            dtype="float32",  # of matrix products: float32, bfloat16; parameters and losses are always float32
            remat=True,  # recompute each block in the backward pass: less memory, and faster on a CPU
        )
    )
    c.text_encoder = "tiny"  # tiny, umt5-xxl
    c.weights = (
        "assets/shapes_teacher.safetensors"  # where student, critic and text encoder start; "" is fresh
    )

    c.data = ml_collections.ConfigDict(
        dict(dir="runs/data", num_train=4096, num_test=512, seed=0)  # clips; drawn with this seed
    )
    c.world = ml_collections.ConfigDict(
        dict(
            size=12,  # pixels
            frames=9,  # at 16 per second
            radius=3.0,  # pixels
            softness=1.0,  # width of an edge, pixels
            starts=(2.0, 4.0, 6.0, 8.0),  # possible x, and possible y, of the first frame, pixels
            speeds=(0.5, 1.0),  # pixels per frame
            pair=False,  # two objects and their relation
        )
    )

    c.teacher = ml_collections.ConfigDict(
        dict(
            kind="network",  # "network": the weights above; "closed_form": the exact optimum for this world;
            # "data" (stage denoising only): no teacher, the clips themselves
            guidance=2.0,  # w of u + w (c - u), 1 is none; the peers' guidance_scale g is w = 1 + g
        )
    )
    c.caption_dropout = 0.1  # stage denoising: share of examples that see the empty caption

    c.schedule = ml_collections.ConfigDict(
        dict(
            train_updates=8,  # T_train of Salt Eq. 9: levels at which the student is trained
            anchor_updates=4,  # T(K) of Eq. 9: levels where shortcuts end
            shift=12.0,  # Salt App. A.1, non-autoregressive
        )
    )
    c.view = ml_collections.ConfigDict(
        dict(shift=5.0, lowest=0.02, highest=0.98)  # where teacher and critic look; peers' values
    )
    c.loss = ml_collections.ConfigDict(
        dict(
            self_consistency=1.0,  # lambda_SC of Eq. 10, for the mean over elements; 0 turns the term off
            stop_gradient="none",  # none, composed, direct, midpoint: see losses.self_consistency
        )
    )
    c.student_optimizer = optimizer(2e-4)
    c.critic_optimizer = optimizer(4e-4)
    c.critic_updates = 3  # critic updates after each student update; the peers take 5
    c.ema = ml_collections.ConfigDict(dict(decay=0.95, start=20))  # start in student updates

    c.mesh = ml_collections.ConfigDict(
        dict(data=1, fsdp=-1, context=1, tensor=1)  # devices per axis; one -1 takes the rest
    )
    c.log_every = 10  # student updates
    c.save_every = 20
    c.keep = 2  # checkpoints
    c.max_skipped = 5  # updates in a row with something not finite, then the run stops
    c.sample = ml_collections.ConfigDict(
        dict(num_updates=(2, 4, 8), solver="cm")  # euler or cm
    )
    return c
