"""TAEHV's decoder for Wan 2.1 by its published list of layers: random arrays under its names, and
the network in torch, one layer after the other.
"""

import numpy as np

# Index in the list, kind, channels in and out; "grow" makes so many frames of one.
LAYERS = (
    (0, "bound"),
    (1, "conv", 16, 256), (2, "relu"),
    (3, "memory", 256), (4, "memory", 256), (5, "memory", 256),
    (6, "enlarge"), (7, "grow", 256, 1), (8, "bare", 256, 128),
    (9, "memory", 128), (10, "memory", 128), (11, "memory", 128),
    (12, "enlarge"), (13, "grow", 128, 2), (14, "bare", 128, 64),
    (15, "memory", 64), (16, "memory", 64), (17, "memory", 64),
    (18, "enlarge"), (19, "grow", 64, 2), (20, "bare", 64, 64),
    (21, "relu"), (22, "conv", 64, 3),
)  # fmt: skip


def arrays_of(seed=0, dtype=np.float32):
    """Name -> array. Variances stay near one, and few pixels reach black or white."""
    rng, arrays = np.random.default_rng(seed), {}

    def conv(name, size, i, o, bias=True, gain=1.4):
        std = gain * (i * size**2) ** -0.5
        arrays[f"{name}.weight"] = std * rng.standard_normal((o, i, size, size), np.float32)
        if bias:
            arrays[f"{name}.bias"] = 0.1 * rng.standard_normal(o, np.float32)

    for index, kind, *sizes in LAYERS:
        name = f"decoder.{index}"
        if kind == "memory":
            (c,) = sizes
            for place, i in ((0, 2 * c), (2, c), (4, c)):
                conv(f"{name}.conv.{place}", 3, i, c, gain=0.5 if place == 4 else 1.4)
        elif kind == "grow":
            conv(f"{name}.conv", 1, sizes[0], sizes[0] * sizes[1], bias=False, gain=1)
        elif kind in ("conv", "bare"):
            conv(name, 3, *sizes, bias=kind == "conv", gain=0.4 if index == 22 else 1)
    arrays["decoder.22.bias"] += 0.5
    return {name: array.astype(dtype) for name, array in arrays.items()}


def decode_with_torch(arrays, latents):
    """Latents [T, 16, h, w] -> frames [4T - 3, 3, 8h, 8w] in [0, 1], float64 inside."""
    import torch
    from torch.nn.functional import conv2d, interpolate

    w = {name: torch.from_numpy(array.astype(np.float64)) for name, array in arrays.items()}
    frames = [x[None] for x in torch.from_numpy(np.asarray(latents, np.float64))]

    def conv(name, x):
        return conv2d(x, w[f"{name}.weight"], w.get(f"{name}.bias"), padding="same")

    def remember(name, x, before):
        y = torch.cat([x, before], dim=1)
        for place in (0, 2):
            y = conv(f"{name}.conv.{place}", y).relu()
        return (conv(f"{name}.conv.4", y) + x).relu()

    for index, kind, *sizes in LAYERS:
        name = f"decoder.{index}"
        if kind == "memory":
            pairs = zip(frames, [torch.zeros_like(frames[0]), *frames[:-1]], strict=True)
            frames = [remember(name, x, before) for x, before in pairs]
        elif kind == "grow":
            frames = [y for x in frames for y in conv(f"{name}.conv", x).split(sizes[0], dim=1)]
        elif kind == "bound":
            frames = [3 * torch.tanh(x / 3) for x in frames]
        elif kind == "relu":
            frames = [x.relu() for x in frames]
        elif kind == "enlarge":
            frames = [interpolate(x, scale_factor=2, mode="nearest") for x in frames]
        else:
            frames = [conv(name, x) for x in frames]
    return torch.cat(frames[3:]).clamp(0, 1).numpy()
