"""`llava_msd` and `qwen2_vl_msd`: an MSD engine behind lmms-eval's model interface."""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from typing import Any

import torch
from accelerate import Accelerator
from lmms_eval.api.instance import GenerationResult, Instance, TokenCounts
from lmms_eval.api.model import lmms
from loguru import logger
from tqdm import tqdm
from transformers import StopStringCriteria

from eagle import MSDModel, Stats, TreeConfig
from llava.errors import UserError
from lmms_eval_msd import report
from lmms_eval_msd.prompts import pictures, write_prompt
from lmms_eval_msd.settings import GenerationSettings

LOAD_OPTIONS = ("attn_implementation", "revision", "draft_revision", "cache_dir", "local_files_only", "token")
TREE_OPTIONS = {"msd_depth": "depth", "msd_top_k": "top_k", "msd_total_tokens": "total_tokens"}
OWN_OPTIONS = ("pretrained", "use_msd", "msd_model_path", "dtype", "device", "device_map", "system_prompt")


class MSD(lmms):
    """One base model, decoded plainly or with a draft, in the same loop and with the same prompts.

    Args:
        pretrained: base model, folder or hub name.
        use_msd: decode with the draft; otherwise the base decodes alone.
        msd_model_path: the draft, folder or hub name.
        dtype: "auto" (the checkpoint's own) or a torch dtype's name.
        device: one device; default is the process's GPU, else the CPU.
        device_map: as in transformers, for a base that is spread over devices ("auto").
        batch_size: accepted; requests are decoded one by one.
        system_prompt: instead of the conversation's own.
        options: `msd_depth`, `msd_top_k`, `msd_total_tokens` of the draft tree, and hub and loading settings.

    Raises:
        UserError: a setting or a checkpoint cannot be used.
    """

    is_simple = True

    def __init__(
        self,
        pretrained: str | None = None,
        use_msd: bool | str = False,
        msd_model_path: str | None = None,
        dtype: str = "auto",
        device: str | None = None,
        device_map: str | None = None,
        batch_size: int | str = 1,
        max_batch_size: int | None = None,
        system_prompt: str | None = None,
        **options: Any,
    ) -> None:
        super().__init__()
        if not pretrained:
            raise UserError("no base model", fix='give --model_args pretrained="BASE"')
        self.use_msd = as_bool("use_msd", use_msd)
        if self.use_msd and not msd_model_path:
            raise UserError("use_msd needs a draft", fix="add --msd_model_path DRAFT, a folder or a hub name")
        tree, loading = split_options(options)
        self.accelerator = Accelerator()
        self._rank, self._world_size = self.accelerator.process_index, self.accelerator.num_processes
        placement: Any = device_map
        if device_map is None:
            place = str(self.accelerator.device) if self._world_size > 1 else device or str(self.accelerator.device)
            placement = None if place == "cpu" else {"": place}
        draft = msd_model_path if self.use_msd else None
        self.msd = MSDModel.from_pretrained(pretrained, draft, dtype=dtype, device_map=placement, tree=tree, **loading)
        self.names = {"base": str(pretrained), "draft": None if draft is None else str(draft)}
        self.system_prompt = None if system_prompt is None else str(system_prompt)
        self.stats: dict[str, Stats] = {}
        self.report: dict[str, Any] | None = None
        self._stops: dict[tuple[str, ...], StopStringCriteria] = {}
        self.batch_size_per_gpu = as_batch_size(batch_size)
        if self.batch_size_per_gpu > 1:
            logger.warning(f"batch_size={batch_size}: llava_msd and qwen2_vl_msd decode requests one by one")

    @property
    def batch_size(self) -> int:
        return self.batch_size_per_gpu

    @property
    def device(self) -> torch.device:
        return self.msd.device if self.msd is not None else self.accelerator.device

    @property
    def tokenizer(self) -> Any:
        return self.msd.tokenizer

    @property
    def chat_template(self) -> str:
        raise UserError(
            "--apply_chat_template is not supported", fix="leave it out: prompts are in the model's conversation anyway"
        )

    def generate_until(self, requests: Sequence[Instance]) -> list[GenerationResult]:
        """Answers each request. Padding requests of a distributed run are answered, but not counted."""
        results = []
        for request in tqdm(requests, disable=self.rank != 0, desc="Model Responding"):
            context, given, doc_to_visual, doc_id, task, split = request.args
            images = pictures(doc_to_visual(self.task_dict[task][split][doc_id]))
            result, stats = self.answer(context, images, GenerationSettings.from_task(given))
            if not request.metadata.get("__padding_only__"):
                self.stats.setdefault(task, Stats.empty()).merge(stats)
            results.append(result)
        return results

    def answer(
        self, context: str, images: Sequence[Any], settings: GenerationSettings
    ) -> tuple[GenerationResult, Stats]:
        """Decodes one request; the text ends before the first of the settings' `until`."""
        prompt = write_prompt(self.msd.target, context, len(images), self.system_prompt)
        inputs = self.msd.target.prepare(prompt, images)
        length = inputs["input_ids"].shape[1]
        engine: dict[str, Any] = {**inputs, **settings.engine, "stopping_criteria": self._stopping(settings.until)}
        output = self.msd.generate(**engine, use_msd=self.use_msd)
        new = output.sequences[0, length:]
        text = settings.cut(self.tokenizer.decode(new, skip_special_tokens=True))
        return GenerationResult(text, TokenCounts(input_tokens=length, output_tokens=len(new))), output.stats

    def _stopping(self, until: tuple[str, ...]) -> list[StopStringCriteria]:
        """The stock criterion, made once for each set of texts: it reads the whole vocabulary when it is made."""
        if not until:
            return []
        if until not in self._stops:
            self._stops[until] = StopStringCriteria(self.tokenizer, list(until))
        return [self._stops[until]]

    @torch.inference_mode()
    def loglikelihood(self, requests: Sequence[Instance]) -> list[tuple[float, bool]]:
        """Scores each request's continuation with the base model alone.

        Returns:
            For each request the mean negative log-likelihood of the continuation's tokens, which is what lmms-eval's
            tasks minimise, and whether greedy search would give the continuation.
        """
        results = []
        for request in tqdm(requests, disable=self.rank != 0, desc="Model Responding"):
            context, continuation, doc_to_visual, doc_id, task, split = request.args
            doc = self.task_dict[task][split][doc_id]
            if not isinstance(continuation, str):
                continuation = str(continuation(doc))
            results.append(self.score(context, continuation, pictures(doc_to_visual(doc))))
        return results

    def score(self, context: str, continuation: str, images: Sequence[Any]) -> tuple[float, bool]:
        """Mean negative log-likelihood of ``continuation`` after the prompt, and whether it is the greedy one."""
        target = self.msd.target
        prompt = write_prompt(target, context, len(images), self.system_prompt)
        space = "" if prompt[-1:].isspace() else " "
        inputs = target.prepare(prompt + space + continuation.strip(), images)
        ids = inputs["input_ids"][0]  # [F]
        asked = target.prepare(prompt, images)["input_ids"][0]  # [P]
        same = (ids[: len(asked)] == asked[: len(ids)]).long().cumprod(0)
        start = min(int(same.sum()), len(ids) - 1)  # a tokenizer may join the prompt's end with the continuation
        hidden = target.prefill(inputs).hidden[:, start - 1 : -1]
        logits = target.head(hidden)[0].float()  # [n, V]
        wanted = ids[start:].to(logits.device)
        loss = torch.nn.functional.cross_entropy(logits, wanted)
        return float(loss), bool((logits.argmax(dim=-1) == wanted).all())

    def generate_until_multi_round(self, requests: Sequence[Instance]) -> list[str]:
        raise NotImplementedError(
            "llava_msd and qwen2_vl_msd do not evaluate tasks of several rounds (generate_until_multi_round)"
        )

    def clean(self) -> None:
        """Sums the statistics and frees the models; lmms-eval calls it in every process after the last request."""
        if self.msd is None:
            return
        stats = report.gather(self.stats)
        settings: dict[str, Any] = {
            "use_msd": self.use_msd,
            **self.names,
            "dtype": str(self.msd.dtype).removeprefix("torch."),
        }
        settings |= {"tree": vars(self.msd.tree) if self.use_msd else None, "processes": self.world_size}
        self.report = report.build(stats, settings, self.device)
        if self.rank == 0:
            report.publish(self.report)
        self.msd = None  # type: ignore[assignment]
        self._stops.clear()
        super().clean()


def split_options(options: dict[str, Any]) -> tuple[TreeConfig | None, dict[str, Any]]:
    """The tree's bounds and the loading settings among ``options``; any other key is an error."""
    known = (*OWN_OPTIONS, *TREE_OPTIONS, *LOAD_OPTIONS)
    for key in options:
        if key not in known:
            near = difflib.get_close_matches(key, known, n=1)
            hint = f"did you mean '{near[0]}'?" if near else f"known: {', '.join(known)}"
            raise UserError(f"unknown model argument '{key}'", fix=hint)
    bounds = {field: options[key] for key, field in TREE_OPTIONS.items() if key in options}
    return TreeConfig(**bounds) if bounds else None, {key: options[key] for key in LOAD_OPTIONS if key in options}


def as_bool(name: str, value: bool | str) -> bool:
    """A switch from `--model_args`, where lmms-eval leaves anything but True and False as text."""
    if isinstance(value, bool):
        return value
    texts = {"true": True, "1": True, "yes": True, "false": False, "0": False, "no": False}
    if str(value).lower() not in texts:
        raise UserError(f"{name} is neither True nor False", where=str(value))
    return texts[str(value).lower()]


def as_batch_size(value: int | str) -> int:
    """A batch size; lmms-eval's `auto` is one."""
    if str(value).startswith("auto"):
        return 1
    if not str(value).isdigit() or int(value) < 1:
        raise UserError("batch_size is not a whole number of at least 1", where=str(value))
    return int(value)
