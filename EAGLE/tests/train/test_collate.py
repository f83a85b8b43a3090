"""Alignment of batches by hand-made integers, padding and noise."""

from dataclasses import replace

import pytest
import torch
from train_support import make_objective, make_sample

from eagle.drafts.compression import Compression
from eagle.hidden_states.shards import Sample
from eagle.train import collate as collating
from eagle.train.collate import Batch, add_noise, collate, draft_loss_mask
from eagle.train.loss import DraftObjective
from eagle.train.rollout import predict_steps, rollout_loss_mask, shift_left
from llava.errors import UserError


def hand_made() -> Sample:
    """Token t is 10 + t and its state is t; image tokens at 1, 2 and 4 with features 100, 101, 102; answer at 5..7."""
    image = torch.tensor([0, 1, 1, 0, 1, 0, 0, 0, 0]).bool()
    ids = torch.arange(10, 19).masked_fill(image, 999)  # an image id outside the vocabulary
    loss = torch.tensor([0, 0, 0, 0, 0, 1, 1, 1, 0]).bool()
    return Sample("hand", ids, loss, image, torch.arange(9.0)[:, None], torch.tensor([[100.0], [101.0], [102.0]]))


def test_rows_pair_states_with_next_tokens_features_and_targets():
    batch = collate([hand_made()], vocab_size=50, max_length=64)
    embeds = batch.input_ids.float()[..., None].masked_scatter(batch.image_mask[..., None], batch.image_features)
    rows = batch.loss_mask.shape[1]
    assert rows == 8
    assert batch.inputs[0, :rows, 0].tolist() == [0, 1, 2, 3, 4, 5, 6, 7]  # h_t
    assert shift_left(embeds, 1, rows)[0, :, 0].tolist() == [100, 101, 13, 102, 15, 16, 17, 18]  # x_{t+1}
    assert shift_left(batch.image_mask, 1, rows)[0].int().tolist() == [1, 1, 0, 1, 0, 0, 0, 0]
    assert shift_left(batch.hidden, 1, rows)[0, :, 0].tolist() == [1, 2, 3, 4, 5, 6, 7, 8]  # h_{t+1}
    # The answer is x_5 x_6 x_7; row 4 reads x_5 and predicts x_6, row 5 reads x_6 and predicts x_7.
    assert batch.loss_mask[0].int().tolist() == [0, 0, 0, 0, 1, 1, 0, 0]


def test_answer_up_to_the_end_of_the_sample():
    # x_3 x_4 x_5 is the answer and x_5 the last token: row 4 would predict a token beyond the sample.
    assert draft_loss_mask(torch.tensor([0, 0, 0, 1, 1, 1]).bool()).int().tolist() == [0, 0, 1, 1, 0]


def test_a_two_token_answer_has_one_row_and_turns_do_not_mix():
    mask = torch.tensor([0, 1, 1, 0, 0, 1, 0, 1, 1, 1]).bool()
    assert draft_loss_mask(mask).int().tolist() == [1, 0, 0, 0, 0, 0, 1, 1, 0]


def test_rollout_rows_stay_in_one_answer_and_match_their_targets():
    loss_mask = draft_loss_mask(torch.tensor([0, 0, 1, 1, 1, 1, 0, 1, 1]).bool())[None]
    assert [rollout_loss_mask(loss_mask, k)[0].int().tolist() for k in (1, 2, 3, 4)] == [
        [0, 1, 1, 1, 0, 0, 1, 0], [0, 1, 1, 0, 0, 0, 0, 0], [0, 1, 0, 0, 0, 0, 0, 0], [0] * 8]  # fmt: skip


def test_cut_at_max_length_takes_image_features_along():
    batch = collate([hand_made()], vocab_size=50, max_length=3)
    assert batch.image_features.flatten().tolist() == [100, 101]
    assert batch.input_ids.tolist() == [[10, 0, 0]]


def test_merged_rows_keep_states_tokens_and_targets_aligned():
    """Rows of `hand_made` read states 0..7 and features 100 101, token 13, feature 102, tokens 15..18."""
    for tokens, states, following, images in (
        (1, [1, 2, 3, 4, 5, 6, 7], [100.5, 13, 102, 15, 16, 17, 18], [1, 0, 1, 0, 0, 0, 0]),
        (0, [2, 4, 5, 6, 7], [13, 15, 16, 17, 18], [0, 0, 0, 0, 0]),
        (2, [0, 1, 2, 3, 4, 5, 6, 7], [100, 101, 13, 102, 15, 16, 17, 18], [1, 1, 0, 1, 0, 0, 0, 0]),
    ):
        batch = collate([hand_made()], vocab_size=50, max_length=64, compression=Compression(tokens))
        embeds = batch.input_ids.float()[..., None].masked_scatter(batch.image_mask[..., None], batch.image_features)
        rows = batch.loss_mask.shape[1]
        assert batch.inputs[0, :rows, 0].tolist() == states
        assert shift_left(embeds, 1, rows)[0, :, 0].tolist() == following
        assert shift_left(batch.image_mask, 1, rows)[0].int().tolist() == images
        counted = batch.loss_mask[0].nonzero().flatten().tolist()
        assert [states[row] for row in counted] == [4, 5]  # as without merging, and each with its own target:
        assert [batch.hidden[0, row + 1, 0].item() for row in counted] == [5, 6]


@pytest.mark.parametrize(
    ("tokens", "expected"),
    [(1, [5, 20, 30, 40, 50, 60, 70, 80]), (0, [20, 40, 50, 60, 70, 80]), (2, [0, 10, 20, 30, 40, 50, 60, 70, 80])],
)
def test_a_merged_row_has_the_mean_of_its_streams(tokens, expected):
    sample = replace(hand_made(), streams=10 * torch.arange(9.0)[:, None])
    batch = collate([sample], vocab_size=50, max_length=64, compression=Compression(tokens))
    assert batch.inputs[0, :, 0].tolist() == expected


def test_a_sample_that_begins_with_a_picture():
    """The first token is in no row of the draft, so its feature is in no mean."""
    sample = hand_made()
    image = torch.tensor([1, 1, 1, 0, 0, 0, 0, 0, 0]).bool()
    sample = replace(sample, image_mask=image, input_ids=torch.arange(10, 19))
    batch = collate([sample], vocab_size=50, max_length=64, compression=Compression(1))
    assert batch.image_features.flatten().tolist() == [100, 101.5]
    assert batch.image_mask[0].int().tolist() == [1, 1, 0, 0, 0, 0, 0, 0]
    assert batch.inputs[0, :, 0].tolist() == [1, 2, 3, 4, 5, 6, 7, 8]


def test_padding_changes_nothing():
    objective = make_objective()
    samples = [make_sample(9, image=2, seed=1), make_sample(14, image=3, seed=2)]
    together = collate(samples, 40, 64)
    joint = predictions(objective, together).split([length - 1 for length in together.lengths])
    for row, sample in enumerate(samples):
        alone = collate([sample], 40, 64)
        torch.testing.assert_close(joint[row], predictions(objective, alone))
        assert together.loss_mask[row].sum() == alone.loss_mask.sum()


def predictions(objective: DraftObjective, batch: Batch) -> torch.Tensor:
    """Of all rows of the samples one after the other, [N, H]."""
    every = torch.arange(batch.loss_mask.shape[1]) < torch.tensor(batch.lengths)[:, None] - 1
    embeds = objective.embeds(batch)
    ((_, _, rows),) = predict_steps(objective.draft, batch.inputs, embeds, batch.image_mask, every, 1)
    return rows


def test_noise_is_on_the_inputs_only_bounded_and_repeatable():
    sample = make_sample(64)
    clean = collate([sample], 40, 64)
    noisy, again = (collate([sample], 40, 64, noise=0.2, seeds=[5]) for _ in range(2))
    assert torch.equal(clean.inputs, clean.hidden)
    assert torch.equal(noisy.hidden, sample.hidden[None]) and torch.equal(noisy.inputs, again.inputs)
    change = (noisy.inputs - noisy.hidden).abs()
    assert 0.7 < change.max() / (0.5 * 0.2 * 512 / 64) <= 1
    assert not torch.equal(add_noise(sample.hidden, 0.2, 5), add_noise(sample.hidden, 0.2, 6))


def test_noise_is_made_once_in_a_step(monkeypatch: pytest.MonkeyPatch) -> None:
    made = []
    monkeypatch.setattr(collating, "add_noise", lambda *given: made.append(given) or add_noise(*given))
    batch = collate([make_sample(), make_sample()], 40, 64, noise=0.2, seeds=[5, 6])
    make_objective(rollout_steps=2)(batch).total.backward()
    assert len(made) == 2


def test_token_ids_outside_the_vocabulary_are_refused():
    with pytest.raises(UserError, match=r"vocabulary of 5.*sample s0"):
        collate([make_sample()], 5, 64)


def test_a_batch_is_made_in_pinned_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """The memory itself is stood in for: it needs a GPU."""
    empty, pinned = torch.empty, []

    def pretend(*size: object, pin_memory: bool = False, **more: object) -> torch.Tensor:
        made = empty(*size, **more)
        if pin_memory:
            pinned.append(made.data_ptr())
        return made

    monkeypatch.setattr(torch, "empty", pretend)
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda own: own if own.data_ptr() in pinned else own.clone())
    samples = [make_sample(), make_sample()]
    batch, plain = (collate(samples, 99, 64, pin_memory=each) for each in (True, False))
    assert [batch.hidden.data_ptr(), batch.image_features.data_ptr()] == pinned
    assert torch.equal(batch.hidden, plain.hidden) and torch.equal(batch.input_ids, plain.input_ids)
