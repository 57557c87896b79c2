"""Which image comes when: a pure function of (seed, position), evaluated where it is needed."""

from collections import OrderedDict
from collections.abc import Sequence

import numpy as np

HELD_OUT = 0x5EED  # of the hash that holds images out; no seed, so that all runs hold out the same ones
MIXED = 0x313D << 40  # of the hash that mixes sets; no epoch
ROUND = 10_000  # positions in a row in which each set of a mixture has its share
BLOCKS = 0xB10C << 40  # of the hash that shuffles blocks; no epoch
WINDOW = 8  # blocks in a row whose images are shuffled together
LISTED = 1 << 24  # the largest set whose order is a list, of 128 MiB per epoch; ImageNet-21k has 14.2 M images
LISTED_BLOCKS = 1 << 16  # the same for blocks, and for the images of a window
FEISTEL = 4  # rounds
CACHED = 1 << 14  # images whose hashes are computed together, within a processor's cache


class Order:
    """The images at the positions of a run.

    One set of n images: position p is the (p mod n)-th image of epoch p // n, and each epoch has its own permutation.
    Several sets, of `sizes` images: of each ROUND positions in a row, each set has a number in proportion to its
    weight, at random places, and goes through its own images in its own epochs. Images are numbered across the sets.

    With `block`, an epoch's order is one of blocks of that many images in a row, as they are stored: the blocks are
    shuffled, and then the images of each WINDOW blocks in a row. The blocks start at another image in each epoch.
    Beyond LISTED images, or LISTED_BLOCKS blocks, a permutation is computed only at the positions that are asked for.
    """

    def __init__(self, seed: int, sizes: Sequence[int], weights: Sequence[float] = (1.0,), block: int = 0):
        self.seed, self.sizes, self.counts, self.block = seed, np.array(sizes), shares(weights), block
        self.first = np.cumsum(self.sizes) - self.sizes  # image of each set
        self.lists: OrderedDict[tuple[int, ...], Listed] = OrderedDict()  # the last permutations that were used
        self.rounds: dict[int, tuple[np.ndarray, np.ndarray]] = {}

    def __call__(self, positions: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The images (n,) at positions (n,), and the epoch of each in its set (n,)."""
        parts, places = self.places(positions)
        epochs, places = np.divmod(places, self.sizes[parts])
        images = np.empty_like(places)
        for part, epoch in {*zip(parts.tolist(), epochs.tolist(), strict=True)}:
            mask = (parts == part) & (epochs == epoch)
            images[mask] = self.first[part] + self.shuffled(places[mask], part, epoch)
        return images, epochs

    def shuffled(self, places: np.ndarray, part: int, epoch: int) -> np.ndarray:
        """The images (n,) of a set at places (n,) in an epoch."""
        n, block = int(self.sizes[part]), self.block
        if not block:
            return self.permuted(places, n, *words_of(self.seed, epoch, part))
        windows, within = np.divmod(places, WINDOW * block)
        for window in np.unique(windows).tolist():
            mask, size = windows == window, min(WINDOW * block, n - window * WINDOW * block)
            within[mask] = self.permuted(within[mask], size, self.seed, BLOCKS, part, epoch, 2 + window)
        blocks, within = np.divmod(windows * WINDOW * block + within, block)
        if (whole := blocks < n // block).any():  # what is left of n images comes last
            blocks[whole] = self.permuted(blocks[whole], n // block, self.seed, BLOCKS, part, epoch, 1)
        start = int(hash_of(self.seed, BLOCKS, part, epoch, 0)[0]) % n
        return (start + blocks * block + within) % n

    def permuted(self, places: np.ndarray, n: int, *words: int) -> np.ndarray:
        """What the permutation of range(n) that the words choose has at places (m,)."""
        if n > (LISTED_BLOCKS if self.block else LISTED):
            return scattered(places, n, *words)
        if words not in self.lists:
            while len(self.lists) >= (4 if self.block else 2) * len(self.sizes):
                self.lists.popitem(last=False)
            self.lists[words] = Listed(n, *words)
        self.lists.move_to_end(words)
        return self.lists[words][places]

    def places(self, positions: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The set of each position (n,), and how many of that set's images come before it (n,)."""
        if len(self.sizes) == 1:
            return np.zeros_like(positions), positions
        rounds, within = np.divmod(positions, ROUND)
        parts, places = np.empty_like(within), np.empty_like(within)
        for number in np.unique(rounds).tolist():
            mask = rounds == number
            parts[mask], places[mask] = (each[within[mask]] for each in self.round(number))
        return parts, rounds * self.counts[parts] + places

    def round(self, number: int) -> tuple[np.ndarray, np.ndarray]:
        """The sets of a round's positions (ROUND,), and how many images of the same set come before in it (ROUND,)."""
        if number not in self.rounds:
            self.rounds = {n: found for n, found in self.rounds.items() if n == number - 1}
            hashed = hash_of(self.seed, MIXED, number, np.arange(ROUND, dtype=np.uint64))
            parts = np.repeat(np.arange(len(self.counts)), self.counts)[np.argsort(hashed, kind="stable")]
            before = np.empty(ROUND, np.int64)
            before[np.argsort(parts, kind="stable")] = np.concatenate([np.arange(count) for count in self.counts])
            self.rounds[number] = parts, before
        return self.rounds[number]


def shares(weights: Sequence[float]) -> np.ndarray:
    """How many of ROUND positions each set has (sets,), by largest remainders; ValueError for one that has none."""
    exact = ROUND * np.array(weights, np.float64) / np.sum(weights)
    counts = np.floor(exact).astype(np.int64)
    counts[np.argsort(counts - exact, kind="stable")[: ROUND - counts.sum()]] += 1
    if (counts < 1).any():
        weight = weights[int(np.argmin(counts))]
        raise ValueError(f"data.shards has a weight {weight} of {np.sum(weights):g} in all; use at least 1 / {ROUND}")
    return counts


def permutation(seed: int, epoch: int, n: int) -> np.ndarray:
    """The order (n,) of an epoch's images."""
    return Listed(n, *words_of(seed, epoch, 0))[np.arange(n)]


def words_of(seed: int, epoch: int, part: int) -> tuple[int, ...]:
    return (seed, epoch, 0, part) if part else (seed, epoch, 0)


class Listed:
    """The permutation (n,) that sorts range(n) by a hash: independent of any library's shuffle.

    At first the images are only put into 256 buckets by the first byte of their hashes. Reading places sorts the
    buckets between the first and the last of them: the first batch of an epoch does not wait for the others.
    """

    def __init__(self, n: int, *words: int):
        self.words, first = words, np.empty(n, np.uint8)
        for part in (np.arange(start, min(start + CACHED, n), dtype=np.uint64) for start in range(0, n, CACHED)):
            first[part[0] : part[-1] + 1] = hash_of(*words, part) >> np.uint64(56)
        self.images = np.argsort(first, kind="stable")  # (n,); a radix sort
        self.ends = np.cumsum(np.bincount(first, minlength=256))
        self.sorted = np.zeros(256, bool)

    def __getitem__(self, places: np.ndarray) -> np.ndarray:
        low, high = np.searchsorted(self.ends, (places.min(), places.max()), side="right")
        if not self.sorted[low : high + 1].all():
            own = self.images[self.ends[low - 1] if low else 0 : self.ends[high]]  # a view
            own[:] = own[np.argsort(hash_of(*self.words, own.astype(np.uint64)))]  # no two hashes are equal
            self.sorted[low : high + 1] = True
        return self.images[places]


def scattered(places: np.ndarray, n: int, *words: int) -> np.ndarray:
    """What a permutation of range(n) has at places (m,), in a time and memory that do not depend on n.

    A balanced Feistel network (Luby & Rackoff 1988) permutes the numbers below the next power of 4. What falls outside
    of range(n) is permuted again, until it falls inside (cycle walking, Black & Rogaway 2002): fewer than 4 times on
    average.
    """
    half = np.uint64(((n - 1).bit_length() + 1) // 2)
    low, keys = np.uint64((1 << int(half)) - 1), hash_of(*words, np.arange(FEISTEL, dtype=np.uint64)).tolist()
    images, outside = places.astype(np.uint64), np.arange(len(places))
    while len(outside):
        left, right = images[outside] >> half, images[outside] & low
        for key in keys:
            left, right = right, left ^ (hash_of(key, right) & low)
        images[outside] = left << half | right
        outside = outside[images[outside] >= n]
    return images.astype(np.int64)


def mirrors(seed: int, epoch: int | np.ndarray, images: np.ndarray) -> np.ndarray:
    """The orientation of each image (n,) in an epoch: 0 original, 1 mirrored."""
    epoch = epoch.astype(np.uint64) if isinstance(epoch, np.ndarray) else epoch
    return (hash_of(seed, epoch, 1, images.astype(np.uint64)) >> np.uint64(63)).astype(np.int64)


def uniform(seed: int, epochs: np.ndarray, images: np.ndarray, use: int) -> np.ndarray:
    """A number in [0, 1) for each image (n,) in its epoch (n,): (n,). `use`, from 2 on, tells such numbers apart."""
    words = hash_of(seed, epochs.astype(np.uint64), use, images.astype(np.uint64))
    return (words >> np.uint64(11)) * 2.0**-53


def held_out_rows(keys: np.ndarray, fraction: float) -> np.ndarray:
    """Whether each key (n,) is among the `fraction` that is held out, by its hash: bool (n,)."""
    return hash_of(HELD_OUT, keys.astype(np.uint64)) < np.uint64(fraction * 2**64)


def hash_of(*words: int | np.ndarray) -> np.ndarray:
    """64-bit hash: splitmix64's finalizer (Steele et al. 2014) after each integer; one-to-one in the last one."""
    state = np.zeros(1, np.uint64)
    for word in words:
        word = word if isinstance(word, np.ndarray) else np.array([word % 2**64], np.uint64)
        state = state ^ word  # and from here on in place: new arrays take most of the time
        state += np.uint64(0x9E3779B97F4A7C15)
        state ^= state >> np.uint64(30)
        state *= np.uint64(0xBF58476D1CE4E5B9)
        state ^= state >> np.uint64(27)
        state *= np.uint64(0x94D049BB133111EB)
        state ^= state >> np.uint64(31)
    return state
