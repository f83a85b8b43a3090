"""MTP layers of Qwen3.5: parity with a plain implementation of the layout, and the same answers as the target alone."""

from __future__ import annotations

import json
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file
from tiny_families import make_qwen3_5, make_qwen3_vl
from tiny_mtp import add_mtp, extract_mtp
from tiny_questions import QUESTIONS, prepared
from torch import Tensor

from eagle import MSDModel, TreeConfig
from eagle.decode.drafter import Drafter
from eagle.doctor.models import check_draft, check_pair
from eagle.drafts.checkpoint import load_draft
from eagle.families import family_named, load_target
from eagle.serving.draft import portable
from llava.errors import UserError

CHAIN, LENGTH = TreeConfig(4, 1, 6), 24


@pytest.fixture(scope="module", autouse=True)
def needs_the_model():
    try:
        family_named("qwen3_5").target_class()
    except ImportError as error:  # an older transformers
        pytest.skip(str(error))


@pytest.fixture(scope="module", params=["dense", "experts", "single experts"])
def pair(request, tmp_path_factory, needs_the_model):
    """A base with its MTP layer: tensors of all experts together, or of each alone."""
    kind, folder = request.param, tmp_path_factory.mktemp("pair")
    base = add_mtp(make_qwen3_5(folder / "base", moe=kind != "dense"), one_each=kind == "single experts")
    target = load_target(base, dtype=torch.float32)
    target.model.generation_config.eos_token_id = None
    return SimpleNamespace(base=base, target=target, draft=load_draft(base, dtype=torch.float32), kind=kind)


class Plain:
    """The layout of the checkpoint, computed over a whole sequence at once."""

    def __init__(self, base) -> None:
        config = json.loads((base / "config.json").read_text())["text_config"]
        self.text = config
        tensors = load_file(base / "model.safetensors").items()
        self.mtp = {name[4:]: value for name, value in tensors if name.startswith("mtp.")}
        self.embedding = dict(tensors)["model.language_model.embed_tokens.weight"]
        self.lm_head = dict(tensors)["lm_head.weight"]

    def norm(self, x: Tensor, name: str) -> Tensor:
        """Weights are stored as their difference to one."""
        scale = (x.pow(2).mean(-1, keepdim=True) + self.text["rms_norm_eps"]).sqrt()
        return x / scale * (1 + self.mtp[f"{name}.weight"])

    def linear(self, x: Tensor, name: str) -> Tensor:
        return x @ self.mtp[f"{name}.weight"].T

    def rotated(self, x: Tensor, positions: Tensor) -> Tensor:
        """``x`` [heads, S, D], ``positions`` [3, S]. A part of D is rotated. Frequency i takes the row i % 3, as far as
        the sections go."""
        rope = self.text["rope_parameters"]
        size = int(x.shape[-1] * rope["partial_rotary_factor"])
        half, sections = size // 2, rope["mrope_section"]
        rows = [i % 3 if i < 3 * sections[i % 3] else 0 for i in range(half)]
        angles = torch.stack([positions[row] * rope["rope_theta"] ** (-2 * i / size) for i, row in enumerate(rows)], -1)
        first, second, rest = x[..., :half], x[..., half:size], x[..., size:]
        cos, sin = angles.cos(), angles.sin()
        return torch.cat([first * cos - second * sin, second * cos + first * sin, rest], dim=-1)

    def attention(self, x: Tensor, positions: Tensor) -> Tensor:
        heads, groups, width = (self.text[key] for key in ("num_attention_heads", "num_key_value_heads", "head_dim"))
        count, own = len(x), "layers.0.self_attn"
        both = self.linear(x, f"{own}.q_proj").view(count, heads, 2 * width)  # a head's queries, then its gates
        query, gate = both[..., :width], both[..., width:].sigmoid()
        key = self.linear(x, f"{own}.k_proj").view(count, groups, width)
        value = self.linear(x, f"{own}.v_proj").view(count, groups, width)
        query = self.rotated(self.norm(query, f"{own}.q_norm").transpose(0, 1), positions)
        key = self.rotated(self.norm(key, f"{own}.k_norm").transpose(0, 1), positions)
        out = torch.zeros(count, heads, width)
        for head in range(heads):
            group = head * groups // heads
            scores = query[head] @ key[group].T / width**0.5
            scores = scores.masked_fill(torch.ones(count, count).triu(1).bool(), -torch.inf)
            out[:, head] = scores.softmax(-1) @ value[:, group]
        return self.linear((out * gate).flatten(1), f"{own}.o_proj")

    def gated(self, x: Tensor, name: str) -> Tensor:
        gate, up = self.linear(x, f"{name}.gate_proj"), self.linear(x, f"{name}.up_proj")
        return self.linear(gate * gate.sigmoid() * up, f"{name}.down_proj")

    def expert(self, x: Tensor, index: int) -> Tensor:
        own = "layers.0.mlp.experts"
        if f"{own}.gate_up_proj" not in self.mtp:
            return self.gated(x, f"{own}.{index}")
        gate, up = (x @ self.mtp[f"{own}.gate_up_proj"][index].T).chunk(2, dim=-1)
        return (gate * gate.sigmoid() * up) @ self.mtp[f"{own}.down_proj"][index].T

    def mlp(self, x: Tensor) -> Tensor:
        own = "layers.0.mlp"
        if f"{own}.gate.weight" not in self.mtp:
            return self.gated(x, own)
        out = self.linear(x, f"{own}.shared_expert_gate").sigmoid() * self.gated(x, f"{own}.shared_expert")
        shares = self.linear(x, f"{own}.gate").softmax(-1)
        for row in range(len(x)):
            best = shares[row].topk(self.text["num_experts_per_tok"])
            for share, index in zip(best.values / best.values.sum(), best.indices.tolist(), strict=True):
                out[row] += share * self.expert(x[row], index)
        return out

    def __call__(self, embeds: Tensor, hidden: Tensor, positions: Tensor) -> Tensor:
        """Outputs [S, H] of rows with the next tokens' embeddings [S, H] and hidden states [S, H]."""
        joined = [self.norm(embeds, "pre_fc_norm_embedding"), self.norm(hidden, "pre_fc_norm_hidden")]
        x = self.linear(torch.cat(joined, dim=-1), "fc")
        x = x + self.attention(self.norm(x, "layers.0.input_layernorm"), positions)
        x = x + self.mlp(self.norm(x, "layers.0.post_attention_layernorm"))
        return self.norm(x, "norm")

    def chain(self, prefill, ids: Tensor, first: Tensor, steps: int, mrope: bool) -> tuple[list[int], Tensor]:
        """Greedy tokens after ``first``, and their log-probabilities."""
        count = len(ids)
        start = int(prefill.next_position) if mrope else count
        positions = prefill.positions[:, 0] if mrope else torch.arange(count).expand(3, -1)
        embeds = torch.cat([prefill.embeds[0, 1:], self.embedding[first]])
        hidden, tokens, scores = prefill.hidden[0], [], []
        for step in range(steps):
            output = self(embeds, hidden, positions)
            logprobs = (output[-1] @ self.lm_head.T).log_softmax(-1)
            tokens.append(int(logprobs.argmax()))
            scores.append(logprobs.max())
            embeds = torch.cat([embeds, self.embedding[tokens[-1]][None]])
            hidden = torch.cat([hidden, output[-1:]])
            positions = torch.cat([positions, torch.full((3, 1), start + step)], dim=1)
        return tokens, torch.stack(scores)


@torch.inference_mode()
@pytest.mark.parametrize("positions", ["mrope", "plain"])
@pytest.mark.parametrize("question", QUESTIONS, ids=lambda question: f"{question[1]} pictures")
def test_chains_are_those_of_the_layout(pair, question, positions, monkeypatch):
    inputs = prepared(pair.target, [question])
    MSDModel(pair.target, pair.draft)
    monkeypatch.setattr(pair.draft, "options", type(pair.draft.options)(positions))
    prefill, first = pair.target.prefill(inputs), torch.tensor([5])
    drafter = Drafter(pair.draft, pair.target.head, prefill.hidden.shape[1] + 8, CHAIN)
    drafter.start(0, prefill, inputs["input_ids"], first)
    found = drafter.expand(CHAIN).of(0)
    plain = Plain(pair.base)
    tokens, scores = plain.chain(prefill, inputs["input_ids"][0], first, 5, positions == "mrope")
    assert found.tokens.tolist() == tokens
    torch.testing.assert_close(found.scores.diff(prepend=torch.zeros(1)), scores, atol=2e-5, rtol=0)


def test_answers_equal_generate(pair):
    """Alone and as a batch, greedy."""
    model, expected = MSDModel(pair.target, pair.draft, CHAIN), []
    for question in QUESTIONS:
        inputs = prepared(pair.target, [question])
        output = pair.target.model.generate(**inputs, do_sample=False, max_new_tokens=LENGTH)
        expected.append(output[0, inputs["input_ids"].shape[1] :].tolist())
        alone = model.generate(**inputs, temperature=0.0, max_new_tokens=LENGTH)
        assert alone.tokens == expected[-1:]
    together = model.generate(**prepared(pair.target, QUESTIONS), temperature=0.0, max_new_tokens=LENGTH)
    assert together.tokens == expected
    assert sum(together.stats.accept_lengths) > 0  # the head drafts some tokens that are kept


def tensors_of(draft):
    return {name: tensor.tolist() for name, tensor in draft.state_dict().items()}


def test_an_extracted_folder_and_shards_have_the_same_head(tmp_path):
    base = add_mtp(make_qwen3_5(tmp_path / "base"))
    wanted = tensors_of(load_draft(base))
    assert tensors_of(load_draft(extract_mtp(base, tmp_path / "own"))) == wanted
    sharded = add_mtp(make_qwen3_5(tmp_path / "sharded"), shards=True)
    (sharded / "model-1.safetensors").unlink()  # the head's own file is sufficient
    assert tensors_of(load_draft(sharded)) == wanted


def config_of(base, **text):
    file = base / "config.json"
    config = json.loads(file.read_text())
    config["text_config"] |= text
    file.write_text(json.dumps(config))
    return base


def test_refusals(tmp_path):
    base = make_qwen3_5(tmp_path / "base")
    with pytest.raises(UserError, match=r"a base model without an MTP layer \(tensors mtp"):
        load_draft(base)
    with pytest.raises(UserError, match=r"a base model without an MTP layer"):
        load_draft(make_qwen3_vl(tmp_path / "other"))
    add_mtp(base, drop=("mtp.norm.weight",))
    with pytest.raises(UserError, match=r"missing norm.weight"):
        load_draft(base)
    complete = add_mtp(make_qwen3_5(tmp_path / "complete"))
    with pytest.raises(UserError, match=r"MTP heads are not exported to vLLM"):
        portable(load_draft(complete), complete)
    with pytest.raises(UserError, match=r"mtp_num_hidden_layers=2"):
        load_draft(config_of(complete, mtp_num_hidden_layers=2))
    fields = (complete / "config.json").read_text()
    for changes, said in (({"MSD": {}}, "did you mean 'msd'"), ({"positions": "plain"}, "outside of section 'msd'")):
        (complete / "config.json").write_text(json.dumps({**json.loads(fields), **changes}))
        with pytest.raises(UserError, match=said):
            load_draft(complete)
    (complete / "config.json").write_text(fields)
    config_of(complete, mtp_num_hidden_layers=1, model_type="qwen3_next")
    with pytest.raises(UserError, match=r"MTP layers of 'qwen3_next' are not supported"):
        load_draft(complete)


def test_an_incomplete_set_of_experts_is_named(tmp_path):
    base = make_qwen3_5(tmp_path / "base", moe=True)
    add_mtp(base, one_each=True, drop=("mtp.layers.0.mlp.experts.1.up_proj.weight",))
    with pytest.raises(UserError, match=r"missing layers.0.mlp.experts.gate_up_proj"):
        load_draft(base)


def test_a_head_of_another_base_is_refused(pair, tmp_path):
    other = load_draft(add_mtp(make_qwen3_5(tmp_path / "base", moe=pair.kind != "dense", num_hidden_layers=8)))
    with pytest.raises(UserError, match=r"number of layers 8 in the draft, 4 in the base"):
        MSDModel(pair.target, other)
    assert [check.state.name for check in check_pair(pair.target, other)] == ["PROBLEM"]


def test_the_doctor_prints_its_conventions(pair):
    draft, found = check_draft(str(pair.base), hub=False)
    assert draft.fc.weight.is_meta
    assert any("MTP: hidden states after the final norm; positions mrope" in check.found for check in found)
    assert [check.state.name for check in check_pair(pair.target, draft)] == ["OK"]


def test_positions_are_an_option(tmp_path):
    base = add_mtp(make_qwen3_5(tmp_path / "base"))
    config = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps(config | {"msd": {"positions": "plain"}}))
    assert "positions plain" in load_draft(base).conventions()
    (base / "config.json").write_text(json.dumps(config | {"msd": {"position": "plain"}}))
    with pytest.raises(UserError, match=r"unknown key 'position'"):
        load_draft(base)
