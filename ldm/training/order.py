"""Which picture sample n shows: a function of seed and n, such that all samples of a step have one size.

A step takes one bucket (ldm.data.buckets), and the next so many of its pictures. The pictures of a bucket come in
epochs of their own, each a permutation. Of a bucket with a share p of the pictures, the first e epochs of the whole
have floor(e p N / B) batches: what is left of a bucket carries over, so that every picture is seen equally often. The
batches of an epoch come in random order.

    step -> epoch, place in it -> bucket, which of its batches -> its epoch, place in that -> picture

Without buckets all pictures are in one, and each epoch is a permutation of all of them. A picture with repeats stands
so many times in its bucket.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property, lru_cache

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from ldm.data.buckets import Buckets
from ldm.data.images import Size
from ldm.training.randomness import generator, permutation


@dataclass(frozen=True)
class Order:
    """The pictures of samples 0, 1, 2, …

    Attributes:
        batch_size: samples of a step, of all processes together.
        repeats: int64 [N], how often an epoch shows each picture; None is once.
    """

    seed: int
    buckets: Buckets
    batch_size: int
    repeats: npt.NDArray[np.int64] | None = None
    _permutations: dict[int, tuple[int, Tensor]] = field(default_factory=dict, repr=False, compare=False)

    def __call__(self, n: int) -> int:
        """The number of the picture that sample n shows."""
        step, place = divmod(n, self.batch_size)
        bucket, batch = batch_of(self.seed, self._counts, self.batch_size, step)
        members = self._members[bucket]
        epoch, place = divmod(batch * self.batch_size + place, len(members))
        known, order = self._permutations.get(bucket, (None, None))
        if known != epoch or order is None:  # a permutation of millions is made once an epoch
            order = permutation(self.seed, len(members), epoch, *self._key(self.buckets.sizes[bucket]))
            self._permutations[bucket] = (epoch, order)
        return int(members[order[place]])

    @cached_property
    def _members(self) -> list[npt.NDArray[np.int64]]:
        groups = [group for _, group in self.buckets.groups()]
        return groups if self.repeats is None else [np.repeat(group, self.repeats[group]) for group in groups]

    @cached_property
    def _counts(self) -> tuple[int, ...]:
        return tuple(len(group) for group in self._members)

    @staticmethod
    def _key(size: Size) -> tuple[int, ...]:
        """The key of the permutations of a bucket; empty for squares, as without buckets."""
        return () if size[0] == size[1] else size


@lru_cache(maxsize=64)
def batch_of(seed: int, counts: tuple[int, ...], batch_size: int, step: int) -> tuple[int, int]:
    """The bucket of a step, and which of the bucket's batches it is.

    Args:
        counts: pictures of each bucket.
    """
    epoch = step * batch_size // sum(counts)  # or a later one, since batches are rounded down
    while (after := sum(batches_before(epoch + 1, counts, batch_size))) <= step:
        epoch += 1
    before = batches_before(epoch, counts, batch_size)
    order = order_of_batches(seed, counts, batch_size, epoch)
    assert len(order) == after - sum(before)
    place = step - sum(before)
    bucket = int(order[place])
    return bucket, before[bucket] + int((order[:place] == bucket).sum())


def batches_before(epoch: int, counts: tuple[int, ...], batch_size: int) -> list[int]:
    """The batches of each bucket in the epochs before this one."""
    return [epoch * count // batch_size for count in counts]


@lru_cache(maxsize=2)
def order_of_batches(seed: int, counts: tuple[int, ...], batch_size: int, epoch: int) -> Tensor:
    """The buckets of an epoch's steps, int64 [steps]."""
    ends = zip(batches_before(epoch, counts, batch_size), batches_before(epoch + 1, counts, batch_size), strict=True)
    steps = torch.tensor([end - begin for begin, end in ends])
    buckets = torch.arange(len(counts)).repeat_interleave(steps)
    return buckets[torch.randperm(len(buckets), generator=generator(seed, "buckets", epoch))]
