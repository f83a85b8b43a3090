"""Samples padded into batches, aligned as the draft decodes.

One sample has tokens ``x_0..x_{S-1}`` and, for each, the target's hidden state ``h`` after its final norm
(``lm_head(h_t)`` predicts ``x_{t+1}``). Row ``t`` of the draft's input, ``t = 0..S-2``:

===========================  =====================  ===========================================================
what                         is                     where it comes from
===========================  =====================  ===========================================================
hidden state read            ``h_t`` (+ noise)      ``inputs[t]``
next token read              ``x_{t+1}``            ``input_ids[t+1]``; its embedding is the base's
next image feature           that of ``x_{t+1}``    ``image_features``, in order, where ``image_mask[t+1]``
position                     ``t``, or M-RoPE's     plain numbers from 0, or ``positions[:, t]``, as in decoding
hidden state to predict      ``h_{t+1}``            ``hidden[t+1]``
token it predicts            ``x_{t+2}``            not read; the loss uses ``softmax(lm_head(h_{t+1}))``
row is in the loss           ``m_{t+1} & m_{t+2}``  ``m``: is an assistant token (``loss_mask``)
===========================  =====================  ===========================================================

A row is in the loss if decoding drafts from it: it reads a token that the target has written and predicts another one.
The first answer token ``x_a`` comes from the prefill; the first draft is made from row ``a-1``, which reads ``h_{a-1}``
and ``x_a`` and predicts ``x_{a+1}``. Masking row t by its own ``m_t``, as published code does, leaves out that row, the
only one of a two-token answer, and trains two rows past the end. Row ``S-2`` predicts a token beyond the sample
and is never in the loss.

Example: S = 7, m = 0 0 0 1 1 1 0 (prompt of three, answer of three, then the next question): rows 2 and 3 are in the
loss; they read x_3 and x_4 and predict x_4 and x_5.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from eagle.drafts.compression import Compression, query_rows
from eagle.drafts.positions import mrope_positions
from eagle.hidden_states.quantise import dequantise
from llava.errors import UserError

if TYPE_CHECKING:
    from eagle.hidden_states.shards import DiskSample, Sample

NO_COMPRESSION = Compression()


@dataclass
class Batch:
    """B samples padded on the right to S positions. Padding follows all real rows, so causal attention never sees it.

    ``input_ids`` [B, S] (0 at padding, and at image tokens unless the draft reads their ids); ``image_mask`` [B, S];
    ``image_features`` [I, H] of all samples in order; ``hidden`` [B, S, H] true states; ``loss_mask`` [B, S-1] rows in
    the loss; ``positions`` [3, B, S] M-RoPE positions, or those that compressed pictures leave (0 at padding), None for
    plain numbers from 0; ``streams`` [B, S, n * H]
    those that enter chosen layers, None if the draft does not read them. ``hidden_scale`` [B, S] of 8-bit states, which
    `to` turns into 16-bit ones on the device; None for others. ``noise`` its strength, ``seeds`` one for each sample,
    and ``lengths`` the rows of each.

    For a head with learnt queries (`queried`): ``pictures`` [B, S] the number of the last picture up to a token, from 1
    in all samples, 0 for none; ``runs`` the number of features of each picture.
    """

    input_ids: Tensor
    image_mask: Tensor
    image_features: Tensor
    hidden: Tensor
    loss_mask: Tensor
    positions: Tensor | None = None
    streams: Tensor | None = None
    hidden_scale: Tensor | None = None
    noise: float = 0.0
    seeds: Sequence[int] = ()
    lengths: Sequence[int] = ()
    pictures: Tensor | None = None
    runs: Sequence[int] = ()

    @property
    def features(self) -> Tensor:
        """[B, S, F] what the draft reads: ``streams``, or ``hidden``."""
        assert self.hidden_scale is None, "a batch in 8 bit that was not sent to its device"
        return self.hidden if self.streams is None else self.streams

    @property
    def inputs(self) -> Tensor:
        """`features` with noise, generated on their own device, which is faster than sending it to a GPU."""
        if not self.noise:
            return self.features
        inputs = self.features.clone()
        for row, (seed, length) in enumerate(zip(self.seeds, self.lengths, strict=True)):
            inputs[row, :length] = add_noise(inputs[row, :length], self.noise, seed)
        return inputs

    def to(self, device: torch.device | str) -> Batch:
        """The batch on a device, with states in 16 bit. 8-bit ones take half the time to read and to send."""
        moved = self._with(lambda part: part.to(device, non_blocking=True))
        if moved.hidden_scale is None:
            return moved
        hidden = dequantise(moved.hidden, moved.hidden_scale, moved.image_features.dtype)
        return replace(moved, hidden=hidden, hidden_scale=None)

    def pin_memory(self) -> Batch:
        """Moves the tensors to pinned memory that are not there yet."""
        return self._with(Tensor.pin_memory)

    def _with(self, change: Callable[[Tensor], Tensor]) -> Batch:
        parts: dict[str, Any] = {field.name: getattr(self, field.name) for field in fields(self)}
        changed: dict[str, Any] = {name: change(part) for name, part in parts.items() if isinstance(part, Tensor)}
        return replace(self, **changed)


def draft_loss_mask(loss_mask: Tensor) -> Tensor:
    """Which rows of a sample are in the loss: ``loss_mask`` [S] of its tokens → [S-1] bool; see the table above.

    >>> draft_loss_mask(torch.tensor([0, 0, 0, 1, 1, 1, 0]).bool()).int().tolist()
    [0, 0, 1, 1, 0, 0]
    """
    following = torch.cat([loss_mask[2:], loss_mask.new_zeros(1)])  # [S-1] m_{t+2}
    return loss_mask[1:] & following


def add_noise(hidden: Tensor, strength: float, seed: int) -> Tensor:
    """``hidden`` [S, H] + (U - 0.5) * strength * 512 / S, U uniform on [0, 1) (the published recipe). One seed
    gives the same noise on devices of one kind."""
    if strength == 0:
        return hidden
    generator = torch.Generator(hidden.device).manual_seed(seed)
    uniform = torch.rand(hidden.shape, generator=generator, device=hidden.device)
    return (hidden.float() + (uniform - 0.5) * (strength * 512 / hidden.shape[0])).to(hidden.dtype)


class Piece(NamedTuple):
    """A sample with the rows that the draft reads. ``positions`` [3, S] as of a `Batch`; ``pictures`` [S] and ``runs``
    too, of this sample alone."""

    sample: Sample | DiskSample
    positions: Tensor | None = None
    pictures: Tensor | None = None
    runs: Sequence[int] = ()

    def length(self, most: int) -> int:
        """The number of tokens that are kept of it, without a part of a picture's rows."""
        mask, length = self.sample.image_mask, min(len(self.sample.input_ids), most)
        while self.pictures is not None and 1 < length < len(mask) and mask[length - 1] and mask[length]:
            length -= 1
        return length

    def runs_of(self, length: int) -> Sequence[int]:
        """The pictures of the first ``length`` tokens."""
        return self.runs if self.pictures is None else self.runs[: int(self.pictures[length - 1])]


def compressed(
    sample: Sample, compression: Compression, position_ids: Tensor | None = None
) -> tuple[Sample, Tensor | None]:
    """The sample with the rows that the draft reads when it decodes with this compression; S becomes S'.

    Row t of the draft's input is ``h_t`` with token t+1, and rows are what is merged: row r of the result has the state
    of its own row t(r) and the mean of its rows' streams at place r, and the token, or the mean of the image features,
    at place r+1.

    Args:
        position_ids: [3, S] M-RoPE positions, or None; a merged row gets the mean of its rows'.
    """
    rows = sample.image_mask[1:]  # [S-1] image rows
    if compression.tokens is None or not rows.any():
        return sample, position_ids
    plan = compression.plan(rows)
    if plan is None:
        return sample, position_ids
    features = sample.hidden.new_zeros(*rows.shape, sample.image_features.shape[1])  # [S-1, H]
    before = int(sample.image_mask[0])  # the first token is in no row
    features[rows] = sample.image_features[before:].to(features.dtype)

    def tokens(values: Tensor) -> Tensor:  # [S, ...] → [S', ...]
        return torch.cat([values[:1], plan.pick(values[1:])])

    image_mask = tokens(sample.image_mask)
    merged = plan.mean(features)[image_mask[1:]].to(sample.image_features.dtype)
    if position_ids is not None:
        position_ids = torch.cat([plan.mean(position_ids[:, :-1].T).T, position_ids[:, -1:]], dim=1)  # [3, S']
    streams = sample.streams
    if streams is not None:
        streams = torch.cat([plan.mean(streams[:-1]).to(streams.dtype), streams[-1:]])
    shorter = replace(
        sample,
        input_ids=tokens(sample.input_ids),
        loss_mask=tokens(sample.loss_mask),
        image_mask=image_mask,
        hidden=torch.cat([plan.pick(sample.hidden[:-1]), sample.hidden[-1:]]),
        image_features=torch.cat([sample.image_features[:before], merged]),
        streams=streams,
    )
    return shorter, position_ids


def queried(sample: Sample, queries: int) -> Piece:
    """The sample with the rows that a head with learnt queries makes (`eagle.drafts.compression.query_rows`), as
    `compressed` numbers them. Its image features are all those of the pictures."""
    rows = sample.image_mask[1:]
    plan = query_rows(rows, queries)

    def tokens(values: Tensor) -> Tensor:  # [S, ...] → [S', ...]
        return torch.cat([values[:1], values[1:][plan.source]])

    shorter = replace(
        sample,
        input_ids=tokens(sample.input_ids),
        loss_mask=tokens(sample.loss_mask),
        image_mask=tokens(sample.image_mask),
        hidden=torch.cat([sample.hidden[:-1][plan.source], sample.hidden[-1:]]),
        image_features=sample.image_features[int(sample.image_mask[0]) :],  # the first token is in no row
    )
    positions = torch.cat([plan.places, torch.tensor([len(rows)])]).expand(3, -1)
    pictures = torch.cat([torch.zeros(1, dtype=torch.long), plan.pictures])
    return Piece(shorter, positions, pictures, [end - start for start, end in plan.runs])


def collate(
    samples: Sequence[Sample | DiskSample],
    vocab_size: int,
    max_length: int,
    noise: float = 0.0,
    seeds: Sequence[int] = (),
    compression: Compression = NO_COMPRESSION,
    positions: str = "plain",
    pin_memory: bool = False,
    image_ids: bool = False,
    queries: int | None = None,
) -> Batch:
    """Pads samples into a `Batch`. States that are still on disk are read to their place in it, in 8 bit if all samples
    are stored so.

    Image rows are merged first, so ``max_length`` counts what is left.

    Args:
        noise: 0 in validation.
        seeds: one for each sample if there is noise.
        positions: the draft's kind (`DraftOptions`).
        pin_memory: whether the batch is made in pinned memory.
        image_ids: whether to keep the ids of image tokens.
        queries: learnt ones of a head whose image rows are their results; None for other heads.

    Raises:
        UserError: a token id is outside the vocabulary, or M-RoPE positions need grids that the sample does not have.
    """
    for sample in samples:
        check_token_ids(sample, vocab_size, image_ids)
    pieces: list[Piece] = []
    for sample in samples:
        own = sample_positions(sample) if positions != "plain" else None
        if queries is not None:
            pieces.append(queried(sample.load(), queries))
        elif compression.tokens is None:
            pieces.append(Piece(sample, own))
        else:
            pieces.append(Piece(*compressed(sample.load(), compression, own)))
    lengths = [piece.length(max_length) for piece in pieces]
    runs = [piece.runs_of(length) for piece, length in zip(pieces, lengths, strict=True)]
    images = [
        int(piece.sample.image_mask[:length].sum()) if queries is None else sum(own_runs)
        for piece, length, own_runs in zip(pieces, lengths, runs, strict=True)
    ]
    size = (len(samples), max(3, *lengths))
    ids, image = torch.zeros(size, dtype=torch.long), torch.zeros(size, dtype=torch.bool)
    loss_mask = torch.zeros(size[0], size[1] - 1, dtype=torch.bool)
    width, dtype = samples[0].width, samples[0].dtype
    scaled = all(piece.sample.hidden_scale is not None for piece in pieces)
    hidden = buffer((*size, width), torch.int8 if scaled else dtype, pin_memory)
    features = buffer((sum(images), width), dtype, pin_memory)
    scale = torch.zeros(size) if scaled else None
    kind = torch.long if compression.tokens is None else torch.float32  # merged rows stand at means
    given = positions != "plain" or queries is not None
    position_ids = torch.zeros(3, *size, dtype=kind) if given else None
    pictures = None if queries is None else torch.zeros(size, dtype=torch.long)
    shape = samples[0].streams_shape
    streams = None if shape is None else buffer((*size, shape[0]), shape[1], pin_memory)
    parts = features.split(images)
    for row, ((sample, own, numbers, _), length) in enumerate(zip(pieces, lengths, strict=True)):
        mask = sample.image_mask[:length]
        kept = sample.input_ids[:length]
        ids[row, :length] = kept if image_ids else kept.masked_fill(mask, 0)
        image[row, :length] = mask
        if length > 1:
            loss_mask[row, : length - 1] = draft_loss_mask(sample.loss_mask[:length].bool())
        sample.hidden_into(hidden[row, :length], None if scale is None else scale[row, :length])
        hidden[row, length:] = 0
        if streams is not None:
            sample.streams_into(streams[row, :length])
            streams[row, length:] = 0
        sample.features_into(parts[row])
        if position_ids is not None and own is not None:
            position_ids[:, row, :length] = own[:, :length]
        if pictures is not None and numbers is not None:
            before = sum(len(each) for each in runs[:row])
            pictures[row, :length] = numbers[:length] + before * (numbers[:length] > 0)
    known = (ids, image, features, hidden, loss_mask, position_ids, streams, scale)
    batch = Batch(*known, noise, tuple(seeds), tuple(lengths), pictures, sum(map(tuple, runs), ()))
    return batch.pin_memory() if pin_memory else batch


def buffer(size: Sequence[int], dtype: torch.dtype, pin_memory: bool) -> Tensor:
    """An empty tensor that is filled once. Pinned memory is used again by torch; other memory is new each time, and
    numpy asks for huge pages, which takes a fraction of the time that small pages take."""
    if pin_memory:
        return torch.empty(size, dtype=dtype, pin_memory=True)
    return torch.from_numpy(np.empty(tuple(size), f"i{dtype.itemsize}")).view(dtype)


def sample_positions(sample: Sample | DiskSample) -> Tensor:
    """M-RoPE positions [3, S] of a sample, those that the target read it with.

    Raises:
        UserError: it has image tokens and no grids of its pictures.
    """
    images, known = int(sample.image_mask.sum()), int(sample.image_grids.prod(dim=-1).sum())
    if images != known:
        raise UserError(
            f"M-RoPE positions need the grids of the pictures: known are {known} of {images} image tokens",
            where=f"sample {sample.id}",
            fix="make the hidden states again with a base of the Qwen2-VL family, or train with plain positions",
        )
    return mrope_positions(sample.image_mask, sample.image_grids)


def check_token_ids(sample: Sample | DiskSample, vocab_size: int, image_ids: bool = False) -> None:
    """Raises `UserError` if a text token is outside the vocabulary, with ``image_ids`` also for an image token. Shapes
    are checked where samples are read."""
    ids = sample.input_ids
    if not ids.numel():
        return
    if image_ids and not inside(ids.masked_fill(~sample.image_mask, 0), vocab_size):
        raise UserError(
            f"the draft reads image tokens as embeddings, but token {int(ids[sample.image_mask].max())} has none",
            where=f"sample {sample.id}",
            fix='set "image_rows": "feature" in section "msd" of --config',
        )
    if not inside(ids.masked_fill(sample.image_mask, 0), vocab_size):
        text = ids[~sample.image_mask]
        raise UserError(
            f"token ids {int(text.min())}..{int(text.max())} in a vocabulary of {vocab_size}",
            where=f"sample {sample.id}",
            fix="is the data made with this base model?",
        )


def inside(ids: Tensor, size: int) -> bool:
    """Whether all ids, at least one, are from 0 to ``size`` - 1."""
    low, high = torch.aminmax(ids)
    return 0 <= int(low) <= int(high) < size
