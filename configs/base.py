"""Every key there is, with its unit. Other configs are deltas of this one; an unknown key is an
error.

Numbers are the shapes world's (two CPU cores). Where the Salt paper is silent the comment says
where a value is from.
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
    # "denoising": train a teacher and its text encoder on data; "teacher_forcing",
    # "ode_regression", "consistency": make a student causal (docs/guide.md); "distil": DMD, the
    # stage of Salt
    c.stage = "distil"
    # How a student under distillation makes its videos: "noised": the whole clip in one update of a
    # noised real one; "noised_chunks": the same with a level for each chunk, causally (CausVid);
    # "rollout": chunk by chunk from noise
    c.video = "noised"
    # The stage before: its workdir, or the file exported from it; "": the student starts as the
    # weights
    c.init_from = ""
    c.seed = 0
    # student updates in the whole run; peers count critic updates, five times as many
    c.updates = 60
    c.batch_size = 24  # clips of an update, over all devices
    # micro-batches that an update takes its clips in, one after the other: less memory, same
    # result
    c.accumulate = 1

    c.model = ml_collections.ConfigDict(
        dict(
            preset="tiny",  # student, critic and teacher: a name in salt_jax/models/presets.py
            # of matrix products: float32, bfloat16; parameters and losses are always float32
            dtype="float32",
            # kernel of attention, see salt_jax/models/attention.py; auto: the fastest of the
            # devices it is for
            attention="auto",
            # What a block's backward pass finds, the rest is computed again: "none" recomputes
            # nothing; "all", all but the block's input; "save_attention", all but that and what
            # attention made; "dots", "dots_no_batch", all but matrix products, or those with
            # weights; "offload" is "all" with the inputs in the host's memory
            remat="all",
            # tokens between blocks; "bfloat16" halves what "all" keeps, and rounds them there
            residual="float32",
        )
    )
    c.text_encoder = "tiny"  # a name in salt_jax/models/text_encoder.py
    # where student, critic and text encoder start: a file, or a folder of launch.convert_wan;
    # "" is fresh
    c.weights = "assets/shapes_teacher.safetensors"

    c.data = ml_collections.ConfigDict(
        dict(
            kind="moving_shapes",  # or "latents": what launch.encode wrote
            clip=(),  # kind latents: frames, height and width of a latent clip
            dir="runs/data",  # where the data set is
            num_train=4096,  # clips
            num_test=512,
            seed=0,  # clips are drawn with it
        )
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
            # "network": the weights above; "closed_form": the exact optimum for this world;
            kind="network",
            # "data" (stage denoising only): no teacher, the clips themselves
            preset="",  # of the teacher's network; "" is the student's
            weights="",  # of a teacher that is another network; "" is the weights above
            # what its weights are kept in: "stored" is as they are read; or float32, bfloat16
            dtype="stored",
            # whether a file that says it is a student, causal or of few updates, may teach
            accept_student=False,
            guidance=2.0,  # w of u + w (c - u), 1 is none; the peers' guidance_scale g is w = 1 + g
        )
    )
    c.caption_dropout = 0.1  # stage denoising: share of examples that see the empty caption

    c.schedule = ml_collections.ConfigDict(
        dict(
            train_updates=8,  # T_train of Salt Eq. 9: levels at which the student is trained
            anchor_updates=4,  # T(K) of Eq. 9: levels where shortcuts end
            shift=12.0,  # Salt App. A.1, non-autoregressive
            # of the student's updates as timesteps (1000 sigma), such as (1000, 757, 522); () is
            # the grid
            levels=(),
        )
    )
    c.memory = ml_collections.ConfigDict(
        dict(  # latent frames; a student that works whole clips ignores it
            chunk=3,  # generated together
            first=3,  # of the first chunk; 1 makes it a picture
            window=0,  # seen at most, with the chunk itself and the sink; 0 is everything
            sink=0,  # first frames of the video, never forgotten
            positions="absolute",  # or "relative": a frame's rank among those that are seen
        )
    )
    c.rollout = ml_collections.ConfigDict(
        dict(
            updates=(2, 4, 8),  # K is drawn for each optimizer update, Salt App. B
            probabilities=(0.2, 0.4, 0.4),
            # of the first chunk; 0 is as the others (Causal Forcing's few-step models take 4)
            first_updates=0,
            solver="cm",  # between updates, as in all peers
        )
    )
    c.align = ml_collections.ConfigDict(
        dict(  # cache alignment, Eq. 11-12; row numbers are those of docs/algorithm.md 9
            weight=0.0,  # 0 turns the term off; VideoREPA's coefficient is 0.5 (row 21)
            start=0,  # student updates before it begins; the paper names 600 of its iterations
            probability=0.5,  # of an update with a shorter rollout ("stochastically", row 22)
            margin=0.1,  # delta of Eq. 12, VideoREPA's (row 20)
            network="base",  # whose features: base (the weights, frozen), critic, student (row 17)
            layers=2,  # blocks before the features are taken; about 0.6 of them (row 18)
        )
    )
    c.stream = ml_collections.ConfigDict(
        dict(  # streaming long tuning (LongLive): one sequence goes on over many updates
            max_frames=0,  # latent frames of a sequence; 0 turns it off
            overlap=3,  # frames of the teacher's window that were there before
            switch=0.5,  # probability that a sequence changes its prompt once
        )
    )
    c.ode = ml_collections.ConfigDict(
        dict(  # stages ode_regression and consistency
            updates=48,  # Euler updates of a trajectory
            guidance=2.0,  # w of the causal teacher along it
            trajectories=512,  # stage ode_regression
        )
    )
    c.lora = ml_collections.ConfigDict(
        dict(
            rank=0, alpha=0.0
        )  # train only a product of this rank on each matrix of the blocks; 0 trains all
    )
    c.view = ml_collections.ConfigDict(
        dict(shift=5.0, lowest=0.02, highest=0.98)  # where teacher and critic look; peers' values
    )
    c.loss = ml_collections.ConfigDict(
        dict(
            # lambda_SC of Eq. 10, for the mean over elements; 0 turns the term off
            self_consistency=1.0,
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
    # Whether moments and the averaged student wait in the host's memory, and come to the devices
    # for their update alone
    c.host_state = False
    c.log_every = 10  # student updates
    c.save_every = 20
    c.keep = 2  # checkpoints, the newest
    # student updates; checkpoints at multiples of it are kept for ever beside the newest; 0 is
    # off
    c.keep_every = 0
    c.max_skipped = 5  # updates in a row with something not finite, then the run stops
    c.sample = ml_collections.ConfigDict(
        dict(num_updates=(2, 4, 8), solver="cm")  # euler or cm
    )
    return c
