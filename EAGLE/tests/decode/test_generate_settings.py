"""What `generate` accepts is served or refused: settings, inputs, seeds, and processors of a batch."""

from __future__ import annotations

from inspect import signature
from typing import Any

import numpy as np
import pytest
import torch
from tiny_draft import make_draft
from tiny_llava import make_llava_hf
from transformers import GenerationConfig, GenerationMixin

from eagle import MSDModel, TreeConfig
from eagle.decode.generate_settings import NO_EFFECT, REFUSED, REFUSED_ARGUMENTS, SERVED
from eagle.decode.sampling import SamplingSettings
from eagle.drafts.checkpoint import load_draft
from eagle.families import load_target
from llava import UserError

PROMPTS = ["USER: Name two rivers of the world. ASSISTANT:", "USER: Hi ASSISTANT:", "USER: the the the the ASSISTANT:"]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> MSDModel:
    folder = tmp_path_factory.mktemp("settings")
    target = load_target(make_llava_hf(folder / "base"), dtype=torch.float32)
    draft = make_draft(folder / "draft", target, agree=1.0)
    return MSDModel(target, load_draft(draft, dtype=torch.float32), TreeConfig(4, 4, 16))


def test_every_setting_of_transformers_is_in_one_list() -> None:
    """A setting that a release adds fails here, and is refused until it is in a list."""
    lists = [set(SERVED), set(NO_EFFECT), set(REFUSED)]
    assert sum(map(len, lists)) == len(set.union(*lists))
    known = {name for name in vars(GenerationConfig()) if not name.startswith("_")}
    assert known - set.union(*lists) == set()
    arguments = set(signature(GenerationMixin.generate).parameters) - {"self", "kwargs", "use_model_defaults"}
    served = {"generation_config", "logits_processor", "stopping_criteria", "prefix_allowed_tokens_fn", "streamer"}
    assert arguments == served | set(REFUSED_ARGUMENTS)


def test_none_switches_off_a_setting_of_the_checkpoint(model: MSDModel, monkeypatch: pytest.MonkeyPatch) -> None:
    """As in transformers, where a None of the call wins."""
    inputs = model.target.prepare(PROMPTS[0])
    own, generate = model.target.model.generation_config, model.target.model.generate
    first = generate(**inputs, max_new_tokens=8, do_sample=False)[0, inputs["input_ids"].shape[1] :].tolist()
    for name, value in (("repetition_penalty", 1.8), ("suppress_tokens", first[:1]), ("eos_token_id", first[1])):
        with monkeypatch.context() as patch:
            patch.setattr(own, name, value)
            outputs = []
            for settings in ({}, {name: None}):
                settings |= {"max_new_tokens": 8, "do_sample": False}
                outputs.append(model.generate(**inputs, **settings).sequences)
                assert torch.equal(outputs[-1], generate(**inputs, **settings)), (name, settings)
            assert outputs[1][0, inputs["input_ids"].shape[1] :].tolist() == first
            assert not torch.equal(outputs[0], outputs[1]), name


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        ({"assistant_model": torch.nn.Linear(1, 1)}, "assistant_model: MSD has its own draft"),
        ({"negative_prompt_ids": torch.ones(1, 2).long()}, "negative_prompt_ids: "),
        ({"synced_gpus": True}, "synced_gpus: "),
        ({"custom_generate": "owner/name"}, "custom_generate: "),
        ({"generation_config": {"max_new_tokens": 4}}, "give a GenerationConfig"),
        ({"num_beams": "2"}, "num_beams='2': "),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_arguments_that_would_be_ignored_are_refused(model: MSDModel, arguments: dict[str, Any], told: str) -> None:
    with pytest.raises(UserError, match=told):
        model.generate(**model.target.prepare(PROMPTS[1]), max_new_tokens=4, do_sample=False, **arguments)


@pytest.mark.parametrize(
    "settings",
    [
        {"num_beams": 2}, {"dola_layers": "high"}, {"penalty_alpha": 0.6, "top_k": 4}, {"guidance_scale": 1.5},
        {"prompt_lookup_num_tokens": 3}, {"token_healing": True},
        {"output_scores": True, "return_dict_in_generate": True},
    ],
    ids=str,
)  # fmt: skip
def test_unsupported_settings_are_refused(model: MSDModel, settings: dict[str, Any]) -> None:
    inputs = model.target.prepare(PROMPTS[1])
    with pytest.raises((UserError, ValueError)) as raised:
        model.generate(**inputs, max_new_tokens=4, do_sample=False, **settings)
    assert len(str(raised.value)) > 10


def test_inputs_that_would_be_ignored_are_refused(model: MSDModel) -> None:
    inputs = model.target.prepare(PROMPTS[0])
    embeds = model.target.model.get_input_embeddings()(inputs["input_ids"])
    generate = model.target.model.generate
    with pytest.raises(UserError, match="inputs_embeds"):
        model.generate(**inputs, inputs_embeds=embeds, max_new_tokens=4, temperature=0.0)
    with pytest.raises(UserError, match="inputs_embeds"):
        generate(inputs_embeds=embeds, max_new_tokens=4, do_sample=False, custom_generate=model)
    moved = torch.arange(inputs["input_ids"].shape[1])[None] + 3
    with pytest.raises(UserError, match="position_ids of your own"):
        model.generate(**inputs, position_ids=moved, max_new_tokens=4, temperature=0.0)
    with pytest.raises(UserError, match="position_ids of your own"):
        generate(**inputs, position_ids=moved, max_new_tokens=4, do_sample=False, custom_generate=model)
    usual = model.generate(**inputs, position_ids=moved - 3, max_new_tokens=4, temperature=0.0)
    assert torch.equal(usual.sequences, generate(**inputs, max_new_tokens=4, do_sample=False))


@pytest.mark.parametrize(
    "settings",
    [
        {"no_repeat_ngram_size": 2}, {"repetition_penalty": 1.4}, {"encoder_repetition_penalty": 1.5},
        {"encoder_no_repeat_ngram_size": 2}, {"min_new_tokens": 6}, {"exponential_decay_length_penalty": (3, 1.5)},
        {"begin_suppress_tokens": [5, 6, 7]}, {"forced_eos_token_id": 2}, {"no_repeat_ngram_size": 3, "top_k": 5},
        {"repetition_penalty": 1.3, "no_repeat_ngram_size": 2, "min_new_tokens": 4},
    ],
    ids=str,
)  # fmt: skip
def test_a_sequence_of_a_batch_has_the_answer_that_it_has_alone(model: MSDModel, settings: dict[str, Any]) -> None:
    batch = model.target.prepare(PROMPTS)
    together = model.generate(**batch, max_new_tokens=16, do_sample=False, **settings).tokens
    for prompt, tokens in zip(PROMPTS, together, strict=True):
        alone = model.target.prepare(prompt)
        expected = model.target.model.generate(**alone, max_new_tokens=16, do_sample=False, **settings)
        assert tokens == expected[0, alone["input_ids"].shape[1] :].tolist()


def test_a_constraint_of_each_sequence_of_a_batch(model: MSDModel) -> None:
    batch = model.target.prepare(PROMPTS)
    allowed = {0: [11, 12], 1: [21, 22], 2: [31, 32]}
    output = model.generate(
        **batch, max_new_tokens=6, do_sample=False, prefix_allowed_tokens_fn=lambda index, _: allowed[index]
    )
    assert all(set(tokens) <= set(allowed[index]) for index, tokens in enumerate(output.tokens))


def test_seeds_of_every_integer_type(model: MSDModel) -> None:
    inputs = model.target.prepare(PROMPTS[0])
    settings = {"max_new_tokens": 8, "temperature": 1.0, "top_k": 0, "top_p": 1.0}
    wanted = model.generate(**inputs, seed=5, **settings).tokens
    for seed in (np.int64(5), np.uint8(5), torch.tensor(5), [5], (np.int32(5),)):
        assert model.generate(**inputs, seed=seed, **settings).tokens == wanted
    for seed in (1.5, True, "5", 2**64, 10**20, None, [1.5], [1, 2]):
        if seed is None:
            continue
        with pytest.raises(UserError, match="seed"):
            model.generate(**inputs, seed=seed, **settings)


def test_limits_mean_what_they_mean_in_transformers(model: MSDModel) -> None:
    inputs = model.target.prepare(PROMPTS[0])
    best = model.generate(**inputs, max_new_tokens=8, temperature=0.0).tokens
    assert model.generate(**inputs, max_new_tokens=8, temperature=1.0, top_p=0.0, top_k=0, seed=3).tokens == best
    for settings in (
        {"temperature": -1.0},
        {"temperature": float("nan")},
        {"stop_strings": ""},
        {"stop_strings": [""]},
    ):
        with pytest.raises(UserError):
            model.generate(**inputs, max_new_tokens=4, **settings)


def test_a_mask_with_holes_is_refused(model: MSDModel) -> None:
    """transformers counts masked tokens in windows and states, and shows them to processors."""
    inputs = model.target.prepare(PROMPTS[0])
    for change in (slice(3, 6), slice(None)):
        mask = inputs["attention_mask"].clone()
        mask[0, change] = 0
        with pytest.raises(UserError, match="zeros inside a prompt"):
            model.generate(**{**inputs, "attention_mask": mask}, max_new_tokens=4, temperature=0.0)


def test_top_p_of_nothing_is_the_best_token_alone(model: MSDModel) -> None:
    settings = SamplingSettings(4.0, top_p=0.0, seed=1)
    inputs = model.target.prepare(PROMPTS[0])
    greedy = model.generate(**inputs, max_new_tokens=12, temperature=0.0)
    assert model.generate(**inputs, max_new_tokens=12, **settings.for_engine()).tokens == greedy.tokens
    assert SamplingSettings(1.0).limits == {"top_p": 1.0, "top_k": 0}
