"""A data folder opened for training: checked once, then batches computed from (step, seed) alone."""

import functools
from collections.abc import Callable
from pathlib import Path

import numpy as np

from ..errors import InputError
from ..files import file_sha256
from ..tokenizers import AnyTokenizer, load_saved
from .manifest import TOKENIZER_NAME, Manifest
from .shards import open_shard


class Dataset:
    """The tokens of a data folder; open one with `Dataset.open`."""

    def __init__(self, folder: Path, manifest: Manifest, tokens: dict[str, np.ndarray]) -> None:
        self.folder = folder
        self.manifest = manifest
        self._tokens = tokens
        # A pure function's last results: resuming at any step computes the same ones again.
        self._window_starts = functools.lru_cache(maxsize=4)(_window_starts)

    @classmethod
    def open(cls, folder: str | Path, verify: bool = True) -> "Dataset":
        """Opens and checks `folder`: the manifest, and with `verify` every byte of every shard.

        InputError names the file and what is wrong with it. The tokenizer is checked when it is first used.
        """
        folder = Path(folder)
        manifest = Manifest.load(folder)
        return cls(folder, manifest, {name: _open_split(folder, manifest, name, verify) for name in manifest.splits})

    def __reduce__(self) -> tuple[Callable[..., "Dataset"], tuple[Path, bool]]:
        """Pickled as its folder: whoever unpickles it maps the same shards instead of receiving a copy."""
        return Dataset.open, (self.folder.resolve(), False)

    @functools.cached_property
    def tokenizer(self) -> AnyTokenizer:
        """The tokenizer that made the tokens."""
        tokenizer = load_saved(self.folder)
        if tokenizer.fingerprint != self.manifest.tokenizer_fingerprint:
            path = self.folder / TOKENIZER_NAME
            raise InputError(f"{path}: not the tokenizer that made these tokens; run prepare again")
        return tokenizer

    def tokens(self, split: str) -> np.ndarray:
        """All ids of `split`, shape (n_tokens,), uint16 or uint32, read-only; a view of a lone shard."""
        self._check_split(split)
        return self._tokens[split]

    def n_bytes(self, split: str) -> int:
        """UTF-8 bytes of the text of `split`."""
        self._check_split(split)
        return self.manifest.splits[split].n_bytes

    def text(self, split: str, n_tokens: int | None = None) -> bytes:
        """The exact text of the first `n_tokens` of `split`, its documents one after the other; of all of them, None,
        it is `n_bytes(split)` long."""
        tokens, tokenizer = self.tokens(split)[:n_tokens], self.tokenizer
        ends = np.flatnonzero(tokens == tokenizer.eot_id)
        documents = zip(
            (0, *(ends + 1)), (*ends, len(tokens)), strict=True
        )  # one by one: some decode by what is before
        return b"".join(tokenizer.decode_bytes(tokens[a + len(tokenizer.start_ids) : b]) for a, b in documents)

    def batch(self, split: str, step: int, batch_size: int, context: int, seed: int) -> np.ndarray:
        """Batch number `step`, int64 of shape (batch_size, context + 1): inputs are [:, :-1] and targets [:, 1:].

        A pure function of its arguments, so training resumes at any step at no cost. Samples are numbered
        step * batch_size + b; each epoch visits every window of `context` tokens once, in its own random order and
        from its own random first token, so windows differ between epochs.
        """
        tokens = self.tokens(split)
        for name, value, least in (("step", step, 0), ("batch_size", batch_size, 1), ("context", context, 1)):
            if value < least:
                raise InputError(f"{name} {value} is not usable; give at least {least}")
        if seed < 0:
            raise InputError(f"seed {seed} is not usable; give at least 0")
        if len(tokens) < context + 1:
            raise InputError(
                f"{self.folder}: {split} holds {len(tokens)} tokens, fewer than context + 1 = {context + 1}; "
                "use a shorter context or prepare more text"
            )
        n_windows = max(1, (len(tokens) - context) // context)
        epochs, positions = np.divmod(np.arange(step * batch_size, (step + 1) * batch_size), n_windows)
        starts = np.empty(batch_size, dtype=np.int64)
        for epoch in np.unique(epochs):
            here = epochs == epoch
            starts[here] = self._window_starts(len(tokens), n_windows, context, seed, int(epoch))[positions[here]]
        return tokens[starts[:, None] + np.arange(context + 1)].astype(np.int64)

    def _check_split(self, split: str) -> None:
        if split not in self._tokens:
            raise InputError(f"no split {split!r} in {self.folder}; use one of {', '.join(self._tokens)}")


def _window_starts(n_tokens: int, n_windows: int, context: int, seed: int, epoch: int) -> np.ndarray:
    """First token of each window of `epoch`, int64 of shape (n_windows,), in the order of the epoch."""
    rng = np.random.default_rng([seed, epoch])
    # The last window ends with its target at phase + n_windows * context, which must exist.
    phase = rng.integers(min(context, n_tokens - n_windows * context))
    return phase + rng.permutation(n_windows) * context


def _open_split(folder: Path, manifest: Manifest, name: str, verify: bool) -> np.ndarray:
    split = manifest.splits[name]
    parts: list[np.ndarray] = []
    for shard, sha256 in split.shards.items():
        path = folder / shard
        part = open_shard(path, verify)
        if verify and file_sha256(path) != sha256:
            raise InputError(f"{path}: not the shard that the manifest lists; run prepare again")
        parts.append(np.asarray(part))
    n_tokens = sum(len(part) for part in parts)
    if not n_tokens or n_tokens != split.n_tokens:
        raise InputError(f"{folder}: {name} holds {n_tokens} tokens instead of {split.n_tokens}; run prepare again")
    tokens = parts[0] if len(parts) == 1 else np.concatenate(parts)
    tokens.flags.writeable = False
    return tokens
