"""The training config is strict, and every shipped config loads."""

import json
from dataclasses import fields
from pathlib import Path

import pytest
from train_support import DRAFT

import eagle.train
from eagle.drafts.config import DraftConfig
from eagle.drafts.msd import DraftModel
from eagle.train.engine import read_deepspeed_config
from eagle.train.main_deepspeed import how_to_resume, main, parse_args
from eagle.train.schedule import BatchSizes
from eagle.train.settings import TrainConfig, override, read_config
from llava.errors import UserError, run_cli

FOLDER = Path(eagle.train.__file__).parent
REQUIRED = ["--basepath", "b", "--cpdir", "c", "--config", "f", "--deepspeed_config", "d"]


def write(path, **train):
    path.write_text(json.dumps({**DRAFT, "train": train}))
    return path


def test_unknown_key_names_the_nearest_known(tmp_path):
    with pytest.raises(UserError, match=r"unknown key 'epoch'.*did you mean 'epochs'"):
        read_config(write(tmp_path / "c.json", epoch=3))


@pytest.mark.parametrize(("key", "message"), [
    ("trian", r"unknown key 'trian'.*did you mean 'train'"),
    ("Train", r"unknown key 'Train'.*did you mean 'train'"),
    ("training", r"unknown key 'training'.*did you mean 'train'"),
    ("msds", r"unknown key 'msds'.*did you mean 'msd'"),
    ("MSD", r"unknown key 'MSD'.*did you mean 'msd'"),
    ("num_hidden_layers", r"num_hidden_layers=\{\}: .*an MSD draft has one layer"),
    ("epochs", r"'epochs' is outside of section 'train'.*move it into"),
    ("learning_rate", r"'learning_rate' is outside of section 'train'"),
])  # fmt: skip
def test_settings_outside_of_their_section_are_refused(tmp_path, key, message):
    (tmp_path / "c.json").write_text(json.dumps({**DRAFT, "train": {"epochs": 3}, key: {}}))
    with pytest.raises(UserError, match=message):
        read_config(tmp_path / "c.json")


def test_keys_of_published_configs_are_not_taken_for_settings(tmp_path):
    """Those of the pocket bases, of LLaVA-1.5-7B (`max_length`) and of Qwen2-VL."""
    published = {"max_length": 4096, "pretraining_tp": 1, "mm_projector_type": "mlp2x_gelu",
                 "tie_word_embeddings": False, "tune_mm_mlp_adapter": False, "transformers_version": "4.31.0",
                 "torch_dtype": "float16", "num_hidden_layers": 1,
                 "attention_dropout": 0.0, "max_window_layers": 28, "unfreeze_mm_vision_tower": True}  # fmt: skip
    for base in ("llava", "qwen2vl"):
        text = json.loads((FOLDER.parents[2] / "pocket" / base / "config.json").read_text())
        published = {**text, **text.get("text_config", {}), **published}
        (tmp_path / "c.json").write_text(json.dumps({**published, **DRAFT, "train": {"epochs": 3}}))
        assert read_config(tmp_path / "c.json")[1] == TrainConfig(epochs=3)


@pytest.mark.parametrize("read", [read_config, read_deepspeed_config, DraftConfig.from_json])
def test_a_key_with_two_values_is_refused(tmp_path, read):
    (tmp_path / "c.json").write_text('{"train": {"epochs": 3, "epochs": 30}}')
    with pytest.raises(UserError, match=r"key 'epochs' is there twice: .*c\.json"):
        read(tmp_path / "c.json")


@pytest.mark.parametrize("train", [{"epochs": "3"}, {"epochs": 0}, {"epochs": 1.5}, {"noise": -1}, {"seed": True}])
def test_bad_values_are_refused(tmp_path, train):
    with pytest.raises(UserError, match=rf"^{next(iter(train))}=.*section 'train'"):
        read_config(write(tmp_path / "c.json", **train))


def test_section_does_not_reach_the_draft_config(tmp_path):
    draft, train = read_config(write(tmp_path / "c.json", epochs=3))
    assert train.epochs == 3
    assert "train" not in draft.to_dict()


def test_flags_win_over_the_config_and_help_lists_every_setting(capsys):
    args = parse_args([*REQUIRED, "--epochs", "2", "--max-steps", "5", "--learning-rate", "1e-3"])
    config = override(TrainConfig(epochs=9, seed=7), args)
    assert (config.epochs, config.max_steps, config.learning_rate, config.seed) == (2, 5, 1e-3, 7)
    with pytest.raises(SystemExit):
        parse_args(["--help"])
    text = capsys.readouterr().out
    assert all("--" + f.name.replace("_", "-") in text for f in fields(TrainConfig))


def test_every_setting_is_read_somewhere():
    source = "".join(path.read_text() for path in FOLDER.glob("*.py"))
    assert all(f"config.{f.name}" in source for f in fields(TrainConfig))


@pytest.mark.parametrize(("name", "shape"), [
    ("llava_v15_7B_config.json", (4096, 32, 32, 11008, 32000)),
    ("llava_v15_13B_config.json", (5120, 40, 40, 13824, 32000)),
    ("qwen2vl_config.json", (3584, 28, 4, 18944, 152064)),
    ("pocket_llava_config.json", (256, 4, 4, 640, 2048)),
    ("pocket_qwen2vl_config.json", (256, 4, 4, 640, 2048)),
])  # fmt: skip
def test_shipped_configs(name, shape):
    import torch

    draft, train = read_config(FOLDER / name)
    assert (draft.hidden_size, draft.num_attention_heads, draft.num_key_value_heads, draft.intermediate_size,
            draft.vocab_size) == shape  # fmt: skip
    with torch.device("meta"):
        names = set(DraftModel(draft).state_dict())
    assert ("layers.0.input_layernorm.weight" in names) == ("qwen" in name)
    if "pocket" not in name:
        assert train == TrainConfig()


def test_qwen_config_has_the_published_rotary_settings():
    draft, _ = read_config(FOLDER / "qwen2vl_config.json")
    assert (draft.rope_theta, draft.mrope_section, draft.rms_norm_eps) == (1e6, (16, 24, 24), 1e-6)


@pytest.mark.parametrize("world", [1, 8])
def test_shipped_deepspeed_config_fits_any_number_of_processes(world):
    config = read_deepspeed_config(FOLDER / "ds_config.json")
    assert BatchSizes.from_deepspeed(config, world, "ds") == BatchSizes(2, 2, world)
    assert (config["gradient_clipping"], config["zero_optimization"]["stage"]) == (0.5, 2)
    assert config["bf16"]["enabled"] is True


def test_optimizer_in_deepspeed_config_is_refused(tmp_path):
    (tmp_path / "ds.json").write_text('{"optimizer": {}}')
    with pytest.raises(UserError, match="has 'optimizer'"):
        read_deepspeed_config(tmp_path / "ds.json")


def test_shipped_configs_are_found_by_bare_name_from_anywhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert read_config("llava_v15_7B_config.json")[0].hidden_size == 4096
    assert read_deepspeed_config("ds_config.json")["gradient_accumulation_steps"] == 2
    (tmp_path / "llava_v15_7B_config.json").write_text(json.dumps(DRAFT))
    assert read_config("llava_v15_7B_config.json")[0].hidden_size == 16
    with pytest.raises(UserError, match="training config not found"):
        read_config("elsewhere/ds_config.json")


def test_pocket_deepspeed_config_loads():
    config = read_deepspeed_config("pocket_ds_config.json")
    assert BatchSizes.from_deepspeed(config, 1, "ds") == BatchSizes(8, 1, 1)


@pytest.mark.parametrize("resume", [False, True])
def test_a_stopped_run_says_what_it_leaves_and_how_to_resume(tmp_path, monkeypatch, resume):
    flags = ["--basepath", "b", "--cpdir", "ck", "--config", "auto", "--deepspeed_config", "d", "--tmpdir_t", "t"]
    args = parse_args(flags + ["--resume"] * resume)
    monkeypatch.chdir(tmp_path)
    assert how_to_resume(args) == "there is no checkpoint yet, and the same command starts again"
    (tmp_path / "ck").mkdir()
    (tmp_path / "ck" / "latest").write_text("step-00000004\n")
    command = "the same command" if resume else "the same command with --resume"
    assert how_to_resume(args) == f"{command} resumes from {tmp_path}/ck/step-00000004"


def test_check_reads_flags_and_config_and_names_the_folder(tmp_path, monkeypatch, capsys):
    """It needs neither the base nor the data. A wrong setting is an error as in training."""
    monkeypatch.chdir(tmp_path)
    flags = ["--basepath", "b", "--cpdir", "ck", "--config", "pocket_llava_config.json", "--deepspeed_config", "d"]
    for more, line in (
        (["--tmpdir_t", "t"], None),
        ([], "error: no data (give --tmpdir_t or --tmpdir_v, or both)\n"),
        (["--tmpdir_t", "t", "--epochs", "0"], "error: epochs=0 (give at least 1)\n"),
    ):
        monkeypatch.setattr("sys.argv", ["main_deepspeed.py", *flags, *more, "--check"])
        assert run_cli(main) == (0 if line is None else 2)
        out, err = capsys.readouterr()
        assert (out, err) == ((f"{tmp_path}/ck\n", "") if line is None else ("", line))
