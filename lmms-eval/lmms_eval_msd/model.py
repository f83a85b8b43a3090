"""The models: `MSDModel` behind lmms-eval's model interface."""

from __future__ import annotations

import os
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from functools import partial
from pathlib import Path
from typing import Any, ClassVar, TypeVar

import torch
from accelerate import Accelerator
from lmms_eval.api.instance import GenerationResult, Instance, TokenCounts
from lmms_eval.api.model import lmms
from tqdm import tqdm
from transformers import StopStringCriteria

from eagle import MSDModel, Stats
from eagle.decode.compiled.engine import LARGEST_BATCH
from eagle.families import Target, family_named, family_of
from llava.errors import UserError
from lmms_eval_msd import report
from lmms_eval_msd.prompts import (
    ChatPrompts,
    Gemma3Prompts,
    Gemma4Prompts,
    Glm4vPrompts,
    InternVLPrompts,
    Llava15Prompts,
    LlavaPrompts,
    Mistral3Prompts,
    OnevisionPrompts,
    Prompt,
    Qwen2_5Prompts,
    Qwen2Prompts,
    Qwen3_5Prompts,
    Qwen3Prompts,
    VideoPrompts,
    Visual,
    visuals_of,
)
from lmms_eval_msd.report import Baseline, load_baseline
from lmms_eval_msd.settings import PROMPTS, GenerationSettings, ModelArgs, as_batch_size, as_bool, as_count
from lmms_eval_msd.turns import MEASURE, Turns

BASELINE_REQUESTS = 8
"""On which the strongest plain way is chosen."""
ASSISTANT = "You are a helpful assistant."
EMPTY_LINE = frozenset({"\n\n"})
Item = TypeVar("Item")


@dataclass(frozen=True)
class Request:
    """One request of lmms-eval.

    ``index``: among the requests; ``given``: the task's generation settings; ``doc``: reads the document with its
    pictures; ``doc_id``: its number; ``counted``: False if it only fills up a distributed run; ``doc_to_text``: how a
    task of several rounds asks its next question.
    """

    index: int
    task: str
    context: str
    given: dict[str, Any]
    doc_to_visual: Callable[[Any], Any]
    doc: Callable[[], Any]
    doc_id: int
    counted: bool = True
    doc_to_text: Any = None

    def visuals(self) -> list[Visual]:
        """Pictures and videos of the request; its document is read now."""
        return visuals_of(self.doc_to_visual(self.doc()))


@dataclass
class Dialogue:
    """A request of several rounds: the task sees the answers so far and asks again, until it says that it is done.

    Args:
        doc: the task's document.
        ask: the task's `doc_to_text`, which from the second round on gives (visuals, context, whether it is over,
            answers so far, what it wants to be told next time).
        context: the current question.
        visuals: those of the current question.
    """

    doc: Any
    ask: Callable[..., Any]
    context: str
    visuals: list[Visual]
    answers: list[str] = field(default_factory=list)
    memory: Any = None
    rounds: int = 0
    over: bool = False

    def add_answer(self, answer: str) -> None:
        """Gives the task the model's answer and takes its next question. A task may rewrite the answers so far."""
        self.answers.append(answer)
        self.rounds += 1
        visuals, context, over, answers, self.memory = self.ask(
            self.doc, previous_output=list(self.answers), round_idx=self.rounds, previous_round_info=self.memory
        )
        if answers is not None:
            self.answers = list(answers)
        self.over = bool(over)
        if not self.over:
            self.context, self.visuals = str(context), visuals_of(visuals)


class MSD(lmms):
    """One base model, decoded with or without a draft, in the same loop and with the same prompts.

    Class attributes are the defaults of the model in lmms-eval that a family's scores are compared with: ``writer`` of
    its prompts, whose fields are settings of `--model_args`; ``max_new_tokens`` of an answer if the task sets none;
    ``ignored_stops``: `until` texts of a task that it does not stop at; ``system``: system prompt, None for the
    template's; ``strips``: drops white space around an answer; ``sampling``: settings that a task can replace.

    Args:
        pretrained: base model, folder or hub name.
        use_msd: decode with the draft; otherwise the base decodes alone.
        msd_model_path: the draft, folder or hub name.
        msd_baseline: for the speed-up. "measure" decodes each request by the strongest plain way too, or, without
            ``use_msd``, by that way alone. Else the results of such a plain run: a file, or a folder with one below it.
        msd_baseline_requests: the strongest plain way is chosen on so many requests; default 8.
        dtype: "auto" (the checkpoint's own) or a torch dtype's name.
        device: one device; default is the process's GPU, else the CPU.
        device_map: as in transformers, for a base that is spread over devices ("auto").
        batch_size: requests decoded together.
        system_prompt: instead of the family's; text, or a file with the text.
        options: `msd_depth`, `msd_top_k`, `msd_total_tokens` of the draft tree, hub and loading settings, and settings
            of the family's prompts (see `lmms_eval_msd.settings`).

    Raises:
        UserError: a setting or a checkpoint cannot be used.
    """

    is_simple = True
    family: ClassVar[str]
    writer: ClassVar[type[ChatPrompts]]
    max_new_tokens: ClassVar[int]
    ignored_stops: ClassVar[frozenset[str]] = frozenset()
    system: ClassVar[str | None] = None
    strips: ClassVar[bool] = False
    sampling: ClassVar[Mapping[str, float]] = {}

    def __init__(
        self,
        pretrained: str | None = None,
        use_msd: bool | str = False,
        msd_model_path: str | None = None,
        msd_baseline: str | None = None,
        msd_baseline_requests: int | str | None = None,
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
        self.measures = msd_baseline == MEASURE
        if msd_baseline and not self.use_msd and not self.measures:
            raise UserError(
                "results as msd_baseline without use_msd", msd_baseline, f"add --use_msd, or give {MEASURE}"
            )
        if msd_baseline_requests is not None and not self.measures:
            fix = f"add --msd_baseline {MEASURE}, or leave it out"
            raise UserError("msd_baseline_requests without a measured baseline", str(msd_baseline_requests), fix)
        self.baseline_requests = as_count(
            "msd_baseline_requests", BASELINE_REQUESTS if msd_baseline_requests is None else msd_baseline_requests
        )
        self.batch_size_per_gpu = as_batch_size(batch_size)
        own = [each.name for each in fields(self.writer) if each.name in PROMPTS]
        self.options = ModelArgs.parse(options, own, family_named(self.family).eval_model)
        self._check_family(str(pretrained))
        earlier = None if self.measures else msd_baseline
        self.baseline: Baseline | None = load_baseline(Path(earlier)) if earlier else None
        self.names = {"base": str(pretrained), "draft": str(msd_model_path) if self.use_msd else None}
        self.accelerator = Accelerator()
        self._rank, self._world_size = self.accelerator.process_index, self.accelerator.num_processes
        check_processes(self._world_size)
        self.report: dict[str, Any] | None = None
        self._stopping: dict[tuple[str, ...], StopStringCriteria] = {}
        self._load(dtype, device, device_map, system_prompt)

    def _check_family(self, pretrained: str) -> None:
        own, found = family_named(self.family), family_of(pretrained, **self.options.hub)
        if found != own:
            raise UserError(
                f"--model {own.eval_model} evaluates {own.name} models, and this is a {found.name} model",
                where=pretrained,
                fix=f"use --model {found.eval_model}",
            )

    def _load(self, dtype: str, device: str | None, device_map: Any, system_prompt: str | None) -> None:
        placement = device_map
        if device_map is None:
            own = str(self.accelerator.device)
            place = own if self._world_size > 1 else device or own
            placement = None if place == "cpu" else {"": place}
        base, draft = str(self.names["base"]), self.names["draft"]
        self.msd = MSDModel.from_pretrained(
            base, draft, dtype=dtype, device_map=placement, tree=self.options.tree, **self.options.loading
        )
        if self.baseline is not None and self.msd.compiled and not self.baseline.compiled:
            fix = f"evaluate the base with the same compile and --msd_baseline {MEASURE}, or give {MEASURE} to this run"
            raise UserError("MSD is compiled, and plain decoding of the baseline was not", self.baseline.path, fix)
        self.turns = Turns(self.msd, self.use_msd, self.measures, self.baseline_requests)
        system = self.system if system_prompt is None else self._resolve_system_prompt(str(system_prompt))
        self.prompts = self.writer(self.msd.target, system, **self.options.prompts)

    @property
    def batch_size(self) -> int:
        return self.batch_size_per_gpu

    @property
    def stats(self) -> dict[str, Stats]:
        """The statistics of each task in this process."""
        return report.by_task(self.turns.timed())

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
        """Answers each request, those of one task with equal settings in batches."""
        results: dict[int, GenerationResult] = {}
        for batch, settings in self._batches(requests):
            prompts = [self.prompts.write(request.context, request.visuals()) for request in batch]
            answers = self._answer(batch, prompts, settings)
            results |= {request.index: answer for request, answer in zip(batch, answers, strict=True)}
        return [results[index] for index in range(len(requests))]

    def generate_until_multi_round(self, requests: Sequence[Instance]) -> list[list[str]]:
        """Answers tasks of several rounds: the texts of each request's rounds.

        As in lmms-eval's own models, a task's `until` is ignored here.
        """
        results: dict[int, list[str]] = {}
        for batch, settings in self._batches(requests, until=None):
            dialogues = [Dialogue(each.doc(), each.doc_to_text, each.context, each.visuals()) for each in batch]
            while active := [pair for pair in zip(batch, dialogues, strict=True) if not pair[1].over]:
                prompts = [self.prompts.write(dialogue.context, dialogue.visuals) for _, dialogue in active]
                answers = self._answer([request for request, _ in active], prompts, settings)
                for (_, dialogue), answer in zip(active, answers, strict=True):
                    dialogue.add_answer(answer.text)
            results |= {request.index: dialogue.answers for request, dialogue in zip(batch, dialogues, strict=True)}
        return [results[index] for index in range(len(requests))]

    def loglikelihood(self, requests: Sequence[Instance]) -> list[tuple[float, bool]]:
        """Scores each request's continuation with the base model alone.

        Returns:
            For each request the mean negative log-likelihood of the continuation's tokens, which lmms-eval's tasks
            minimise, and whether greedy search would give the continuation.
        """
        results = []
        for request in tqdm(requests, disable=self.rank != 0, desc="Model Responding"):
            context, continuation, doc_to_visual, doc_id, task, split = request.args
            doc = self._doc(task, split, doc_id)
            if not isinstance(continuation, str):
                continuation = str(continuation(doc))
            prompt = self.prompts.write(context, visuals_of(doc_to_visual(doc)))
            results.append(score(self.msd.target, self.prompts, prompt, continuation))
        return results

    def settings(self, given: dict[str, Any] | None) -> GenerationSettings:
        """A task's settings, with the family's defaults."""
        return GenerationSettings.from_task({**self.sampling, **(given or {})}, self.max_new_tokens, self.ignored_stops)

    def clean(self) -> None:
        """Sums the statistics and frees the models; lmms-eval calls it in every process after the last request."""
        if self.msd is None:
            return
        self.turns.choose()
        timed, speeds = report.gather(self.turns.timed(), self.turns.speeds)
        settings: dict[str, Any] = {
            "use_msd": self.use_msd,
            **self.names,
            "dtype": str(self.msd.dtype).removeprefix("torch."),
            "tree": asdict(self.msd.tree) if self.use_msd else None,
            "draft_image_tokens": self.msd.compression.tokens if self.use_msd else None,
            "compile": self.msd.backend or False,
            "batch_size": self.batch_size,
            "processes": self.world_size,
        }
        if self.measures:
            settings["baseline_requests"] = self.baseline_requests
        self.report = report.build(timed, settings, self.device, self.baseline, speeds)
        if self.rank == 0:
            report.publish(self.report)
        self.msd = self.prompts = self.turns = None  # type: ignore[assignment]
        super().clean()

    def _batches(
        self, instances: Sequence[Instance], **changes: Any
    ) -> Iterator[tuple[list[Request], GenerationSettings]]:
        """Requests that are decoded together, and their settings; ``changes`` replace the task's.

        Requests of one batch share their statistics, so all are of one task, and either all counted or none.
        """
        requests = [self._request(index, instance) for index, instance in enumerate(instances)]
        settings = [self.settings({**request.given, **changes}) for request in requests]

        def key(request: Request) -> Hashable:
            return request.task, request.counted, settings[request.index].key

        sizes = [size for size in sorted({1, self.batch_size}) if size <= LARGEST_BATCH]
        self.msd.warm_up(progress=self.rank == 0, batch_sizes=sizes)
        with tqdm(total=len(requests), disable=self.rank != 0, desc="Model Responding") as bar:
            for batch in batches(requests, key, self.batch_size):
                yield batch, settings[batch[0].index]
                bar.update(len(batch))

    def _request(self, index: int, instance: Instance) -> Request:
        context, given, doc_to_visual, *texts, doc_id, task, split = instance.args
        doc = partial(self._doc, task, split, doc_id)
        counted = not instance.metadata.get("__padding_only__")
        return Request(index, task, context, given or {}, doc_to_visual, doc, doc_id, counted, *texts)

    def _doc(self, task: str, split: str, doc_id: Any) -> Any:
        return self.task_dict[task][split][doc_id]

    def _answer(
        self, batch: Sequence[Request], prompts: Sequence[Prompt], settings: GenerationSettings
    ) -> list[GenerationResult]:
        """One batch: each answer up to the first of the settings' `until`."""
        inputs = self.prompts.inputs(prompts)
        engine: dict[str, Any] = {**inputs, **settings.engine, "stopping_criteria": self._criteria(settings.until)}
        first = batch[0]
        answers = self.turns.answer(engine, first.task, [request.doc_id for request in batch], first.counted)
        length = inputs["input_ids"].shape[1]
        mask = inputs.get("attention_mask")
        prompt_lengths = [length] * len(prompts) if mask is None else mask.sum(dim=1).tolist()
        results = []
        for count, new in zip(prompt_lengths, answers, strict=True):
            text = settings.cut(self.msd.tokenizer.decode(new, skip_special_tokens=True))
            text = self.prompts.finish(text)
            text = text.strip() if self.strips else text
            results.append(GenerationResult(text, TokenCounts(input_tokens=int(count), output_tokens=len(new))))
        return results

    def _criteria(self, until: tuple[str, ...]) -> list[StopStringCriteria]:
        """transformers' criterion, made once for each set of texts, since it reads the whole vocabulary."""
        if not until:
            return []
        if until not in self._stopping:
            self._stopping[until] = StopStringCriteria(self.msd.tokenizer, list(until))
        return [self._stopping[until]]


class LlavaMSD(MSD):
    """LLaVA-1.5."""

    family = "llava"
    writer = Llava15Prompts
    max_new_tokens = 1024


class LlavaNextMSD(MSD):
    """LLaVA-1.6."""

    family = "llava_next"
    writer = LlavaPrompts
    max_new_tokens = 1024


class LlavaOnevisionMSD(MSD):
    """LLaVA-OneVision."""

    family = "llava_onevision"
    writer = OnevisionPrompts
    max_new_tokens = 1024


class Qwen2VLMSD(MSD):
    """Qwen2-VL."""

    family = "qwen2_vl"
    writer = Qwen2Prompts
    max_new_tokens = 128
    system = ASSISTANT
    strips = True


class Qwen2_5VLMSD(MSD):
    """Qwen2.5-VL."""

    family = "qwen2_5_vl"
    writer = Qwen2_5Prompts
    max_new_tokens = 32768
    ignored_stops = EMPTY_LINE
    system = ASSISTANT


class Qwen3VLMSD(MSD):
    """Qwen3-VL."""

    family = "qwen3_vl"
    writer = Qwen3Prompts
    max_new_tokens = 128
    ignored_stops = EMPTY_LINE
    system = ASSISTANT


class Qwen3VLMoeMSD(Qwen3VLMSD):
    """Qwen3-VL with experts."""

    family = "qwen3_vl_moe"


class Qwen3_5MSD(Qwen3VLMSD):
    """Qwen3.5."""

    family = "qwen3_5"
    writer = Qwen3_5Prompts
    max_new_tokens = 1024
    sampling: ClassVar[Mapping[str, float]] = {"temperature": 0.7, "top_p": 0.8, "top_k": 20}


class Qwen3_5MoeMSD(Qwen3_5MSD):
    """Qwen3.5 with experts."""

    family = "qwen3_5_moe"


class Gemma3MSD(MSD):
    """Gemma 3."""

    family = "gemma3"
    writer = Gemma3Prompts
    max_new_tokens = 128
    ignored_stops = EMPTY_LINE
    system = ASSISTANT


class Gemma4MSD(Gemma3MSD):
    """Gemma 4."""

    family = "gemma4"
    writer = Gemma4Prompts


class Gemma4UnifiedMSD(Gemma4MSD):
    """Gemma 4 unified."""

    family = "gemma4_unified"


class Mistral3MSD(MSD):
    """Mistral 3."""

    family = "mistral3"
    writer = Mistral3Prompts
    max_new_tokens = 512
    sampling: ClassVar[Mapping[str, float]] = {"temperature": 0.6, "top_p": 0.9, "repetition_penalty": 1.2}

    def settings(self, given: dict[str, Any] | None) -> GenerationSettings:
        """A task that does not sample needs no temperature for that."""
        given = dict(given or {})
        if given.get("do_sample") is False:
            given.setdefault("temperature", 0)
        return super().settings(given)


class Glm4vMSD(MSD):
    """GLM-4.1V."""

    family = "glm4v"
    writer = Glm4vPrompts
    max_new_tokens = 8192


class Glm4vMoeMSD(Glm4vMSD):
    """GLM-4.5V."""

    family = "glm4v_moe"


class Glm46VMSD(Glm4vMSD):
    """GLM-4.6V."""

    family = "glm46v"


class GlmOcrMSD(MSD):
    """GLM-OCR, with the checkpoint's chat template alone."""

    family = "glm_ocr"
    writer = VideoPrompts
    max_new_tokens = 1024


class PaddleOCRVLMSD(MSD):
    """PaddleOCR-VL, with the checkpoint's chat template alone."""

    family = "paddleocr_vl"
    writer = ChatPrompts
    max_new_tokens = 1024


class InternVLMSD(MSD):
    """InternVL."""

    family = "internvl"
    writer = InternVLPrompts
    max_new_tokens = 1024


@torch.inference_mode()
def score(target: Target, prompts: ChatPrompts, prompt: Prompt, continuation: str) -> tuple[float, bool]:
    """Mean negative log-likelihood of ``continuation`` after the prompt, and whether it is the greedy one."""
    space = "" if prompt.text[-1:].isspace() else " "
    inputs = prompts.inputs([replace(prompt, text=prompt.text + space + continuation.strip())])
    ids = inputs["input_ids"][0]  # [F]
    asked = prompts.inputs([prompt])["input_ids"][0]  # [P]
    same = (ids[: len(asked)] == asked[: len(ids)]).long().cumprod(0)
    start = min(int(same.sum()), len(ids) - 1)  # a tokenizer may join the prompt's end with the continuation
    hidden = target.prefill(inputs).hidden[:, start - 1 : -1]
    logits = target.head(hidden)[0].float()  # [n, V]
    expected = ids[start:].to(logits.device)
    loss = torch.nn.functional.cross_entropy(logits, expected)
    return float(loss), bool((logits.argmax(dim=-1) == expected).all())


def batches(items: Iterable[Item], key: Callable[[Item], Hashable], size: int) -> Iterator[list[Item]]:
    """Items of equal key, at most ``size`` together; within a key in their order.

    >>> list(batches([1, 3, 2, 5, 7], lambda number: number % 2, 2))
    [[1, 3], [5, 7], [2]]
    """
    groups: dict[Hashable, list[Item]] = {}
    for item in items:
        groups.setdefault(key(item), []).append(item)
    for group in groups.values():
        for start in range(0, len(group), size):
            yield group[start : start + size]


def check_processes(joined: int) -> None:
    """Raises `UserError` if processes were started together and do not know of each other."""
    started = int(os.environ.get("WORLD_SIZE", "1"))
    if started != joined:
        raise UserError(
            f"{started} processes were started, accelerate sees {joined}", fix="on CPUs set ACCELERATE_USE_CPU=true"
        )
