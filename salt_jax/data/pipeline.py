"""From records to batches with grain.

Batch k is a function of (seed, k), whatever was read before it.
"""

import functools
from collections.abc import Callable, Iterator, Sequence

import numpy as np

from salt_jax.moving_shapes.latents import to_latent
from salt_jax.moving_shapes.shapes import World


def batches(
    source: Sequence,
    *,
    batch_size: int,
    seed: int,
    start: int,
    encode_caption: Callable[[str], np.ndarray],
    rows: np.ndarray,
    world: World,
) -> Iterator[dict[str, np.ndarray]]:
    """This process's rows of the global batches start, start + 1, ... without end; every epoch is
    shuffled anew.

    Indices are shuffled and batched first and each process reads only its own rows of a batch. So
    the global batch is the same for any number of processes, and an epoch may end inside a batch.

    Args:
      source: records with `caption` or its encoding `text`, and all with the same of: `video`,
        uint8 [F, H, W, 3] or float32 latents; `switch`, the encoding of a switch prompt; `image`
        and `condition` of image-to-video, and `states`, float32; `scene`.
      batch_size: global, in examples.
      start: number of global batches consumed before.
      rows: of the global batch, int [b]: see `sharding.local_rows`.
      encode_caption: pure; called once per distinct caption, in the thread that reads ahead; the
        results are kept. Not called where records have `text`.
      world: whose autoencoder makes latents of pixels.

    Yields:
      text [b, ...], stacked encodings, and what else the records have: video float32
      [b, F, H, W, C], latents; switch, image, condition, states; scene int32 [b].

    Raises:
      ValueError: the source is empty.
    """
    import grain  # here, because programs that open no data start without it

    if not len(source):
        raise ValueError("the data set is empty: build it with at least one example")
    encode = functools.cache(encode_caption)

    def load(indices: np.ndarray) -> dict[str, np.ndarray]:
        return collate([source[int(i)] for i in indices[rows]], encode, world)

    # In batches. One thread: decoding holds the interpreter lock, more would only compete with the
    # training loop.
    ahead = grain.ReadOptions(num_threads=1, prefetch_buffer_size=2)
    order = grain.MapDataset.range(len(source)).seed(seed).shuffle().repeat()
    stream = iter(order.batch(batch_size).map(load).to_iter_dataset(ahead))
    stream.set_state({"next_index": start})
    return stream


def collate(
    records: Sequence, encode_caption: Callable[[str], np.ndarray], world: World
) -> dict[str, np.ndarray]:
    """Records as one batch, see `batches`."""
    texts = (r["text"] if "text" in r else encode_caption(r["caption"]) for r in records)
    batch = {"text": np.stack(list(texts))}
    for name in ("switch", "video", "image", "condition", "states"):
        if name in records[0]:
            batch[name] = np.stack([r[name] for r in records])
    if "video" in batch and batch["video"].dtype == np.uint8:
        batch["video"] = to_latent(batch["video"], world)
    if "scene" in records[0]:
        batch["scene"] = np.array([r["scene"] for r in records], np.int32)
    return batch
