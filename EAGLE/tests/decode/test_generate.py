"""`MSDModel.generate` on tiny real models: equal to transformers, and exact at its edges."""

import warnings
from functools import partial

import pytest
import torch
from tiny_draft import make_draft
from tiny_llava import make_image, make_liuhaotian, make_llava_hf
from transformers import LogitsProcessor, LogitsProcessorList, TextIteratorStreamer, TextStreamer

from eagle import MSDModel, TreeConfig
from eagle.families import load_target
from llava import UserError

PROMPTS = {
    "text": ("USER: Name two rivers. ASSISTANT:", 0),
    "image": ("USER: <image>\nHow many shapes? ASSISTANT:", 1),
    "image in the middle": ("USER: Here <image>\nis my picture. ASSISTANT:", 1),
    "two images": ("USER: <image>\n<image>\nWhich is larger? ASSISTANT:", 2),
}
TREES = [TreeConfig(5, 10, 60), TreeConfig(3, 2, 6), TreeConfig(0, 3, 4), TreeConfig(2, 1, 4), TreeConfig(4, 4, 1)]


@pytest.fixture(scope="module", params=["liuhaotian", "llava-hf"])
def model(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp(request.param)
    make = make_liuhaotian if request.param == "liuhaotian" else make_llava_hf
    base = make(folder / "base")
    target = load_target(base, dtype=torch.float32)
    draft = make_draft(folder / "draft", target)
    return MSDModel.from_pretrained(base, draft, dtype=torch.float32)


def inputs_of(model, name):
    text, count = PROMPTS[name]
    return model.target.prepare(text, [make_image(seed=i) for i in range(count)])


def plain(model, inputs, **settings):
    return model.target.model.generate(**inputs, **{"do_sample": False, **settings})


@pytest.mark.parametrize("name", PROMPTS)
@pytest.mark.parametrize("tree", TREES, ids=str)
def test_greedy_equals_transformers(model, name, tree):
    inputs = inputs_of(model, name)
    output = model.generate(**inputs, temperature=0.0, max_new_tokens=40, tree=tree)
    assert torch.equal(output.sequences, plain(model, inputs, max_new_tokens=40))
    assert output.stats.new_tokens == 40
    assert max(output.stats.tree_sizes) <= tree.total_tokens


def test_the_draft_is_sometimes_right(model):
    """Else the tests above would only ever see empty acceptance."""
    stats = model.generate(**inputs_of(model, "image"), temperature=0.0, max_new_tokens=60, tree=TREES[0]).stats
    assert {0, 1} <= set(stats.accept_lengths)


@pytest.mark.parametrize("count", [1, 2, 3, 5, 8])
def test_max_new_tokens_is_exact(model, count):
    inputs = inputs_of(model, "image")
    output = model.generate(**inputs, temperature=0.0, max_new_tokens=count)
    assert output.sequences.shape[1] - inputs["input_ids"].shape[1] == count == output.stats.new_tokens


def test_plain_decoding_returns_the_same_type(model):
    inputs = inputs_of(model, "image")
    output = model.generate(**inputs, temperature=0.0, max_new_tokens=20, use_msd=False)
    assert torch.equal(output.sequences, plain(model, inputs, max_new_tokens=20))
    assert output.stats.tau == 1.0


@pytest.mark.parametrize("rows", [1, 7])
def test_plain_decoding_with_padding_rows(model, rows, monkeypatch):
    """Each forward has so many rows, and the answer is the same."""
    inputs, verify, widths = inputs_of(model, "image"), type(model.target).verify, set()
    monkeypatch.setattr(
        type(model.target),
        "verify",
        lambda self, tokens, *rest: (widths.add(tokens.shape[1]), verify(self, tokens, *rest))[1],
    )
    output = model.generate(**inputs, temperature=0.0, max_new_tokens=20, use_msd=False, plain_rows=rows)
    assert torch.equal(output.sequences, plain(model, inputs, max_new_tokens=20))
    assert widths == {rows} and output.stats.tau == 1.0


def test_near_ties_are_decided_by_one_row(model, monkeypatch):
    """With a head that swaps the two best logits of forwards with several rows if they are near."""
    from eagle.decode import decoder

    monkeypatch.setattr(decoder, "TIE_STEPS", 1_000_000)
    inputs, head = inputs_of(model, "image"), type(model.target).head

    def rounded(self, hidden):
        logits = head(self, hidden)
        best = logits.topk(2)
        near = decoder.steps_between(*best.values.unbind(-1)) <= decoder.TIE_STEPS
        swap = near & (torch.tensor(hidden.dim() == 3 and hidden.shape[1] > 1))
        values = torch.where(swap.unsqueeze(-1), best.values.flip(-1), best.values)
        return logits.scatter(-1, best.indices, values)

    monkeypatch.setattr(type(model.target), "head", rounded)
    settings = {"temperature": 0.0, "max_new_tokens": 40, "tree": TREES[0]}
    expected = plain(model, inputs, max_new_tokens=40)
    assert not torch.equal(model.generate(**inputs, **settings).sequences, expected)
    output = model.generate(**inputs, **settings, one_row_ties=True)
    assert torch.equal(output.sequences, expected)
    assert {1, max(output.stats.tree_sizes)} <= set(output.stats.tree_sizes) and output.stats.new_tokens == 40


def test_rows_that_cannot_be_had_are_refused(model):
    inputs = inputs_of(model, "text")
    wrong = [{"plain_rows": 3}, {"plain_rows": 0, "use_msd": False}, {"one_row_ties": True, "temperature": 1.0}]
    for settings in wrong:
        with pytest.raises(UserError, match=r"plain_rows=|one_row_ties"):
            model.generate(**inputs, max_new_tokens=3, **settings)
    two = {name: value.repeat(2, 1) for name, value in inputs.items() if name in ("input_ids", "attention_mask")}
    with pytest.raises(UserError, match="one_row_ties with 2 prompts"):
        model.generate(**two, max_new_tokens=3, one_row_ties=True)


@pytest.mark.parametrize(
    "settings",
    [
        {"repetition_penalty": 1.4},
        {"no_repeat_ngram_size": 2},
        {"min_new_tokens": 12},
        {"bad_words_ids": [[5], [9]]},
        {"repetition_penalty": 1.3, "min_new_tokens": 6},
    ],
    ids=str,
)
def test_processors_that_look_back_equal_transformers(model, settings):
    inputs = inputs_of(model, "image")
    # an end token that plain decoding meets early, so that min_new_tokens has something to hold back
    end = int(plain(model, inputs, max_new_tokens=8)[0, -1])
    settings = {**settings, "eos_token_id": end, "max_new_tokens": 30}
    expected = plain(model, inputs, **settings)
    assert torch.equal(model.generate(**inputs, temperature=0.0, **settings).sequences, expected)


def test_stops_at_the_end_token(model):
    inputs = inputs_of(model, "text")
    free = plain(model, inputs, max_new_tokens=20)[0].tolist()
    end, absent = free[-5], next(token for token in range(3, 100) if token not in free)
    settings = {"max_new_tokens": 40, "eos_token_id": [end, absent]}
    expected = plain(model, inputs, **settings)
    assert expected[0, -1] == end
    assert torch.equal(model.generate(**inputs, temperature=0.0, **settings).sequences, expected)


def test_stop_strings_equal_transformers(model):
    inputs = inputs_of(model, "text")
    free = plain(model, inputs, max_new_tokens=30)[0, inputs["input_ids"].shape[1] :]
    pieces = [model.tokenizer.decode([token]).strip() for token in free.tolist()]
    text = next(piece for piece in pieces[5:] if piece.isascii() and piece.isalpha())
    expected = plain(model, inputs, max_new_tokens=30, stop_strings=[text], tokenizer=model.tokenizer)
    output = model.generate(**inputs, temperature=0.0, max_new_tokens=30, stop_strings=[text])
    assert expected.shape[1] < inputs["input_ids"].shape[1] + 30
    assert torch.equal(output.sequences, expected)


def test_streams_what_it_returns(model, capsys):
    inputs = inputs_of(model, "image")
    streamer = TextStreamer(model.tokenizer, skip_prompt=True)
    output = model.generate(**inputs, temperature=0.0, max_new_tokens=25, streamer=streamer)
    text = model.tokenizer.decode(output.sequences[0, inputs["input_ids"].shape[1] :])
    assert capsys.readouterr().out.strip() == text.strip()


def test_a_streamer_is_bound_to_custom_generate(model, capsys):
    """transformers hands none on to a function, so it is bound."""
    inputs = inputs_of(model, "image")
    expected = plain(model, inputs, max_new_tokens=12)
    text = model.tokenizer.decode(expected[0, inputs["input_ids"].shape[1] :])
    printing = partial(model, streamer=TextStreamer(model.tokenizer, skip_prompt=True))
    found = model.target.model.generate(**inputs, custom_generate=printing, do_sample=False, max_new_tokens=12)
    assert torch.equal(found, expected)
    assert capsys.readouterr().out.strip() == text.strip()
    pieces = TextIteratorStreamer(model.tokenizer, skip_prompt=True, timeout=60)
    bound = partial(model, streamer=pieces)
    model.target.model.generate(**inputs, custom_generate=bound, do_sample=False, max_new_tokens=12)
    assert "".join(pieces).strip() == text.strip()


def test_a_processor_of_ones_own_equals_transformers(model):
    inputs = inputs_of(model, "image")
    free = plain(model, inputs, max_new_tokens=25)
    unwanted = int(free[0, inputs["input_ids"].shape[1] + 4])

    class NotAfterItself(LogitsProcessor):
        """Forbids one token, and what came two tokens before."""

        def __call__(self, input_ids, scores):
            return scores.scatter(1, input_ids[:, -2:-1], -torch.inf).index_fill(
                1, torch.tensor([unwanted]), -torch.inf
            )

    own = LogitsProcessorList([NotAfterItself()])
    expected = plain(model, inputs, max_new_tokens=25, logits_processor=own)
    assert not torch.equal(expected, free)
    output = model.generate(**inputs, temperature=0.0, max_new_tokens=25, logits_processor=own)
    assert torch.equal(output.sequences, expected)


def test_beam_search_through_custom_generate_is_refused(model):
    with pytest.raises(UserError, match="num_beams=2"):
        model.target.model.generate(**inputs_of(model, "text"), custom_generate=model, num_beams=2, max_new_tokens=4)


def test_sampling_is_repeatable_by_seed(model):
    inputs = inputs_of(model, "image")
    asked = [(1.0, 1), (1, 1), (1.0, 2)]  # a whole number is a temperature too
    draws = [model.generate(**inputs, temperature=t, seed=s, max_new_tokens=15).sequences for t, s in asked]
    assert torch.equal(draws[0], draws[1])
    assert not torch.equal(draws[0], draws[2])


def test_sampling_from_one_token_is_greedy(model):
    inputs = inputs_of(model, "image")
    output = model.generate(**inputs, temperature=0.8, top_k=1, max_new_tokens=20)
    assert torch.equal(output.sequences, plain(model, inputs, max_new_tokens=20))


def test_works_as_custom_generate(model):
    inputs = inputs_of(model, "image")
    found = model.target.model.generate(**inputs, custom_generate=model, do_sample=False, max_new_tokens=20)
    assert torch.equal(found, plain(model, inputs, max_new_tokens=20))


def test_long_prompts_keep_max_new_tokens(model):
    ids = torch.randint(5, 200, (1, 700))
    output = model.generate(input_ids=ids, temperature=0.0, max_new_tokens=12)
    assert torch.equal(output.sequences, plain(model, {"input_ids": ids}, max_new_tokens=12))
    assert output.stats.new_tokens == 12


def test_beams_are_refused(model):
    with pytest.raises(UserError, match="num_beams=2"):
        model.generate(**inputs_of(model, "text"), num_beams=2, max_new_tokens=4)


def test_pictures_and_places_must_agree(model):
    inputs = inputs_of(model, "image")
    without = {key: value for key, value in inputs.items() if key != "pixel_values"}
    with pytest.raises(UserError, match="places for 16 image tokens, the images give 0"):
        model.generate(**without, max_new_tokens=4)


def test_nothing_is_called_by_a_name_that_transformers_gives_up(model):
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        model.generate(**inputs_of(model, "image"), temperature=0.0, max_new_tokens=6)
    assert not [str(each.message) for each in seen if "is deprecated" in str(each.message)]
