"""The order of samples, the schedule and the learning rate, in integers."""

import pytest
import torch

from eagle.train.schedule import (
    IMAGE,
    TEXT,
    BatchSizes,
    Schedule,
    epoch_items,
    image_probability,
    micro_batches,
    split_indices,
)
from eagle.train.settings import TrainConfig
from llava.errors import UserError


def schedule(text, image, total=1, **settings):
    return Schedule.plan(BatchSizes(total, 1, 1), text, image, TrainConfig(**settings))


def test_published_curriculum_is_text_for_twenty_epochs_then_rises_to_one():
    shares = [image_probability(epoch, 40, 0.5) for epoch in range(40)]
    assert shares[:20] == [0.0] * 20
    assert shares[20:] == pytest.approx([i / 20 for i in range(1, 21)])


def test_images_from_the_start_and_never():
    assert [image_probability(e, 2, 0.0) for e in range(2)] == [0.5, 1.0]
    assert [image_probability(e, 2, 1.0) for e in range(2)] == [0.0, 0.0]


def test_a_constant_share_and_images_alone():
    assert [image_probability(e, 3, 0.0, 0.5, 0.5) for e in range(3)] == [0.5, 0.5, 0.5]
    plan = schedule(30, 20, epochs=2)
    shares = [[item.source for item in epoch_items(plan, 0, 0.0, 0, start, 1.0)].count(IMAGE) for start in (0.0, 1.0)]
    assert shares == [10, 20]


def test_epoch_has_the_exact_share_of_images_without_repeats():
    plan = schedule(30, 20, epochs=4)
    for epoch, images in enumerate([0, 0, 10, 20]):
        items = epoch_items(plan, epoch, 0.5, seed=42)
        assert len(items) == 20  # min(text, image)
        rows = {source: [i.row for i in items if i.source == source] for source in (TEXT, IMAGE)}
        assert len(rows[IMAGE]) == images
        assert all(len(set(r)) == len(r) for r in rows.values())


def test_order_is_a_function_of_seed_and_epoch():
    plan = schedule(30, 20, epochs=4)
    assert epoch_items(plan, 2, 0.5, 42) == epoch_items(plan, 2, 0.5, 42)
    assert epoch_items(plan, 2, 0.5, 42) != epoch_items(plan, 3, 0.5, 42)
    assert epoch_items(plan, 2, 0.5, 42) != epoch_items(plan, 2, 0.5, 43)


@pytest.mark.parametrize(("text", "image", "source"), [(5, 0, TEXT), (0, 5, IMAGE)])
def test_a_single_set_is_used_alone_in_every_epoch(text, image, source):
    plan = schedule(text, image, epochs=4)
    for epoch in range(4):
        items = epoch_items(plan, epoch, 0.5, 0)
        assert sorted(i.row for i in items) == [0, 1, 2, 3, 4]
        assert {i.source for i in items} == {source}


def test_a_set_smaller_than_a_batch_is_repeated():
    items = epoch_items(schedule(1, 0, total=4, epochs=1), 0, 0.5, 0)
    assert [i.row for i in items] == [0, 0, 0, 0]
    assert len({i.noise_seed for i in items}) == 4


def test_processes_share_each_step_and_resume_at_any_step():
    sizes = BatchSizes(micro=2, accumulation=2, world=2)
    items = epoch_items(Schedule.plan(sizes, 24, 0, TrainConfig(epochs=1)), 0, 0.5, 0)
    first, second = (micro_batches(items, sizes, rank) for rank in (0, 1))
    assert first == [items[0:2], items[4:6], items[8:10], items[12:14], items[16:18], items[20:22]]
    assert second == [items[2:4], items[6:8], items[10:12], items[14:16], items[18:20], items[22:24]]
    assert micro_batches(items, sizes, 1, first_step=2) == second[4:]


def test_split_is_disjoint_and_leaves_training_samples():
    train, held_out = split_indices(100, 0.05, 42)
    assert len(held_out) == 5 and sorted(train + held_out) == list(range(100))
    assert split_indices(1, 0.05, 42) == ([0], [])
    assert [len(part) for part in split_indices(2, 0.05, 42)] == [1, 1]


def test_steps_follow_data_processes_and_epochs():
    plan = Schedule.plan(BatchSizes(2, 2, 8), 64600, 64600, TrainConfig())
    assert (plan.steps_per_epoch, plan.total_steps, plan.warmup) == (2018, 80720, 202)
    assert plan.learning_rate(0) == pytest.approx(5e-5 / 202)
    assert plan.learning_rate(201) == pytest.approx(5e-5) == plan.learning_rate(202)
    assert plan.learning_rate(80719) == pytest.approx(5e-5 / (80720 - 202))
    assert "80720" in plan.describe()


def test_batch_sizes_follow_deepspeeds_rule():
    def read(world=2, **config):
        return BatchSizes.from_deepspeed(config, world, "ds.json")

    assert read(train_micro_batch_size_per_gpu=2, gradient_accumulation_steps=2) == BatchSizes(2, 2, 2)
    assert read(train_batch_size=16, train_micro_batch_size_per_gpu=2) == BatchSizes(2, 4, 2)
    assert read(train_batch_size=16) == BatchSizes(8, 1, 2)
    with pytest.raises(UserError, match="no batch size"):
        read()
    with pytest.raises(UserError, match="train_batch_size 16 is not"):
        read(train_batch_size=16, train_micro_batch_size_per_gpu=3, gradient_accumulation_steps=2)
    with pytest.raises(UserError, match="batch size 'auto'"):
        read(train_micro_batch_size_per_gpu="auto")


def test_torch_global_random_state_is_left_alone():
    before = torch.get_rng_state()
    epoch_items(schedule(5, 5, epochs=2), 1, 0.5, 0)
    assert torch.equal(before, torch.get_rng_state())
