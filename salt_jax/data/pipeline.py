"""From records to batches with grain. Batch k is a function of (seed, k), whatever was read before it."""

import functools
from collections.abc import Callable, Iterator, Sequence

import grain
import numpy as np

from salt_jax.data.shapes import to_latent

# In batches. One thread: decoding holds the interpreter lock, more would only compete with the training loop.
READ_AHEAD = grain.ReadOptions(num_threads=1, prefetch_buffer_size=2)


def batches(
    source: Sequence,
    *,
    batch_size: int,
    seed: int,
    start: int,
    encode_caption: Callable[[str], np.ndarray],
    process_index: int,
    process_count: int,
) -> Iterator[dict[str, np.ndarray]]:
    """This process's share of the global batches start, start + 1, ... without end; every epoch is shuffled anew.

    Indices are shuffled and batched first and each process reads only its own slice of a batch. So the shares,
    laid end to end, are the same global batch for any number of processes, and an epoch may end inside a batch.

    Args:
      source: records with `video` uint8 [F, H, W, 3] or float32 latents, `caption`, `scene`, and perhaps `states`.
      batch_size: global, in examples.
      start: number of global batches consumed before.
      encode_caption: pure; called once per distinct caption, in the thread that reads ahead; the results are kept.

    Yields:
      video float32 [b, F, H, W, 3] in [-1, 1], text [b, ...] stacked encodings, scene int32 [b], and
      states where the records have them; b = batch_size / process_count.

    Raises:
      ValueError: the batch does not divide over the processes, or the source is empty.
    """
    if batch_size % process_count:
        raise ValueError(f"batch_size={batch_size} must be a multiple of the {process_count} processes")
    if not len(source):
        raise ValueError("the data set is empty: build it with at least one example")
    share = batch_size // process_count
    mine = slice(process_index * share, (process_index + 1) * share)
    encode = functools.cache(encode_caption)

    def load(indices: np.ndarray) -> dict[str, np.ndarray]:
        records = [source[int(i)] for i in indices[mine]]
        batch = {
            "video": np.stack([r["video"] for r in records]),
            "text": np.stack([encode(r["caption"]) for r in records]),
            "scene": np.array([r["scene"] for r in records], np.int32),
        }
        if batch["video"].dtype == np.uint8:
            batch["video"] = to_latent(batch["video"])
        if "states" in records[0]:
            batch["states"] = np.stack([r["states"] for r in records])
        return batch

    order = grain.MapDataset.range(len(source)).seed(seed).shuffle().repeat()
    stream = iter(order.batch(batch_size).map(load).to_iter_dataset(READ_AHEAD))
    stream.set_state({"next_index": start})
    return stream
