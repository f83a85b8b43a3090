"""Validation's figures, computed a second time from their definitions: one root at a time, full logits, no batches."""

from types import SimpleNamespace

import pytest
import torch
from torch.nn import functional as F
from train_support import make_objective, make_sample

from eagle.train.checkpoint import Progress
from eagle.train.collate import draft_loss_mask
from eagle.train.dataset import TrainingData
from eagle.train.engine import PlainEngine
from eagle.train.schedule import BatchSizes
from eagle.train.settings import TrainConfig
from eagle.train.trainer import Trainer

DEPTH = 3


def few_choices(objective):
    """A head of four tokens, so that a draft that has learnt nothing is right now and then."""
    objective.head[4:] = 0
    return objective


def drafted(objective, sample, root):
    """Predictions of ``h_{root+1}``, ``h_{root+2}``, ...: each forward reads the whole sequence again."""
    embeds = objective.draft.embed_tokens(sample.input_ids)
    embeds[sample.image_mask] = sample.image_features
    hidden = sample.hidden[: root + 1]
    for _ in range(min(DEPTH, len(sample.input_ids) - 1 - root)):
        rows = slice(1, len(hidden) + 1)
        x = objective.draft.fuse(hidden[None], embeds[None, rows], sample.image_mask[None, rows])
        predicted = objective.draft(x, torch.arange(len(hidden))[None])[0, -1:]
        hidden = torch.cat([hidden, predicted])
        yield predicted[0]


@torch.no_grad()
def by_definition(objective, samples):
    """The values of `summary`."""
    head, rows, chains, tokens, cycles = objective.head, [], [], 0, 0
    tried, taken = [0] * DEPTH, [0] * DEPTH
    for sample in samples:
        loss_mask = draft_loss_mask(sample.loss_mask).tolist()
        greedy = (sample.hidden @ head.T).argmax(-1).tolist()
        accepted = {}
        for root in (at for at, counted in enumerate(loss_mask) if counted):
            accepted[root] = 0
            for step, predicted in enumerate(drafted(objective, sample, root)):
                wanted = sample.hidden[root + 1 + step]
                if step == 0:
                    hidden_loss = F.smooth_l1_loss(predicted, wanted)
                    soft, logits = (wanted @ head.T).softmax(-1), predicted @ head.T
                    order = logits.argsort(descending=True).tolist()
                    rows.append((hidden_loss, -(soft * logits.log_softmax(-1)).sum(), order.index(greedy[root + 1])))
                if not all(loss_mask[root : root + step + 1]):
                    break
                tried[step] += 1
                if int((predicted @ head.T).argmax()) != greedy[root + 1 + step]:
                    break
                taken[step] += 1
                accepted[root] += 1
        chains += accepted.values()
        at = min(accepted, default=0)
        while at in accepted:
            cycles += 1
            tokens += min(accepted[at] + 1, max(accepted) + 1 - at)
            at += accepted[at] + 1
    hidden, token = (float(torch.stack([row[i] for row in rows]).mean()) for i in (0, 1))
    return {
        "loss": hidden + 0.1 * token,
        "hidden_loss": hidden,
        "token_loss": token,
        **{f"top{k}": sum(place < k for *_, place in rows) / len(rows) for k in (1, 2, 3)},
        "tau": tokens / cycles,
        "expected_tau": 1 + sum(chains) / len(chains),
        "accept_at": [m / r if r else 0.0 for m, r in zip(taken, tried, strict=True)],
        "rows": len(rows),
    }


class Held(list):
    """A sample set."""

    def describe(self):
        return {}


def make_sets():
    """Held-out samples of different lengths; the last text one is beyond the limit."""
    text = [make_sample(9 + 2 * i, seed=i) for i in range(6)]
    image = [make_sample(12 + i, image=3, seed=50 + i) for i in range(3)]
    return {"text": (Held(text), [], list(range(6))), "image": (Held(image), [], list(range(3)))}


def trainer_of(rank, world, joined):
    """A trainer that only validates; ``joined`` adds up over the processes."""
    settings = {"simulated_depth": DEPTH, "head_chunk": 4, "validation_limit": 5, "noise": 0.5}
    objective = few_choices(make_objective(seed=1, **settings))
    sizes = BatchSizes(2, 1, world)
    engine = PlainEngine(objective, TrainConfig(**settings), {}, sizes)
    engine.rank, engine.sum = rank, joined
    logged, saved = [], []
    tracker = SimpleNamespace(log_validation=lambda step, results: logged.append((step, results)))
    store = SimpleNamespace(save_draft=lambda engine, name, *more: saved.append(name))
    data, schedule = TrainingData(make_sets()), SimpleNamespace(sizes=sizes)
    trainer = Trainer(engine, data, schedule, objective.config, store, tracker, Progress(step=7))
    return trainer, logged, saved


def test_figures_are_those_of_their_definitions():
    """In batches of two, padded, image samples and the limit included; noise is for training alone."""
    trainer, logged, saved = trainer_of(0, 1, lambda sums: sums)
    trainer._validate()
    ((step, results),) = logged
    assert step == 7 and saved == ["best"] and set(results) == {"text", "image"}
    objective = trainer.engine.objective.cpu()
    assert objective.training
    for name, values in results.items():
        samples = trainer.data.sources[name][0][:5]
        expected = by_definition(objective.eval(), samples)
        assert set(values) == set(expected)
        for key, value in expected.items():
            assert values[key] == pytest.approx(value, rel=1e-4), (name, key)
        assert 0 < values["top1"] < values["top3"] and 1.2 < values["tau"] < DEPTH and values["accept_at"][1] > 0
    assert trainer.progress.best == pytest.approx(sum(values["tau"] for values in results.values()) / 2)
    assert trainer.progress.history["validations"] == [{"step": 7, "results": results}]


def test_two_processes_find_what_one_finds():
    """Each validates its share; with three image samples the second has only one."""
    alone, logged, _ = trainer_of(0, 1, lambda sums: sums)
    alone._validate()
    parts = []
    trainer_of(1, 2, lambda sums: parts.append(sums) or sums)[0]._validate()
    both, joined, _ = trainer_of(0, 2, lambda sums: sums + parts.pop(0))
    both._validate()
    for name, expected in logged[0][1].items():
        for key, value in expected.items():
            assert joined[0][1][name][key] == pytest.approx(value, rel=1e-5), (name, key)


def test_no_held_out_sample_is_no_validation():
    trainer, logged, saved = trainer_of(0, 1, lambda sums: sums)
    trainer.data = TrainingData({"text": (Held(), [], [])})
    trainer._validate()
    assert (logged, saved, trainer.progress.best) == ([], [], None)
