"""The models: an MSD engine behind lmms-eval's model interface."""

from __future__ import annotations

import os
from collections.abc import Callable, Hashable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

import torch
from accelerate import Accelerator
from lmms_eval.api.instance import GenerationResult, Instance
from lmms_eval.api.model import lmms
from tqdm import tqdm

from eagle import MSDModel, Stats
from llava.errors import UserError
from lmms_eval_msd import report
from lmms_eval_msd.answering import Answerer
from lmms_eval_msd.batches import batches
from lmms_eval_msd.conversation import Conversation, Prompt
from lmms_eval_msd.families import LLAVA, LLAVA_NEXT, QWEN2_5_VL, QWEN2_VL, Family, check_family
from lmms_eval_msd.likelihood import score
from lmms_eval_msd.options import Options, as_batch_size, as_bool
from lmms_eval_msd.prompts import conversation_for
from lmms_eval_msd.rounds import Dialogue
from lmms_eval_msd.runs import Baseline, load_baseline
from lmms_eval_msd.settings import GenerationSettings
from lmms_eval_msd.visuals import Visual, visuals_of


@dataclass(frozen=True)
class Ask:
    """One request of lmms-eval.

    ``place``: among the requests. ``doc``: reads the document, pictures and all. ``counted``: not there to fill up a
    distributed run. ``doc_to_text``: how a task of several rounds asks on.
    """

    place: int
    task: str
    context: str
    given: dict[str, Any]
    doc_to_visual: Callable[[Any], Any]
    doc: Callable[[], Any]
    counted: bool = True
    doc_to_text: Any = None


class MSD(lmms):
    """One base model, decoded plainly or with a draft, in the same loop and with the same prompts.

    Args:
        pretrained: base model, folder or hub name.
        use_msd: decode with the draft; otherwise the base decodes alone.
        msd_model_path: the draft, folder or hub name.
        msd_baseline: results of a plain run, to report the speed-up; a file, or a folder with one below it.
        dtype: "auto" (the checkpoint's own) or a torch dtype's name.
        device: one device; default is the process's GPU, else the CPU.
        device_map: as in transformers, for a base that is spread over devices ("auto").
        batch_size: requests decoded together.
        system_prompt: instead of the family's; text, or a file with the text.
        options: `msd_depth`, `msd_top_k`, `msd_total_tokens` of the draft tree, hub and loading settings, and settings
            of the family's prompts (see `lmms_eval_msd.options`).

    Raises:
        UserError: a setting or a checkpoint cannot be used.
    """

    is_simple = True
    family: ClassVar[Family]

    def __init__(
        self,
        pretrained: str | None = None,
        use_msd: bool | str = False,
        msd_model_path: str | None = None,
        msd_baseline: str | None = None,
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
        if msd_baseline and not self.use_msd:
            raise UserError("msd_baseline without use_msd", msd_baseline, "add --use_msd: it gives the speed-up")
        self.batch_size_per_gpu = as_batch_size(batch_size)
        self.options = Options.read(options, self.family)
        check_family(self.family, str(pretrained), self.options.hub)
        self.baseline: Baseline | None = load_baseline(Path(msd_baseline)) if msd_baseline else None
        self.names = {"base": str(pretrained), "draft": str(msd_model_path) if self.use_msd else None}
        self.accelerator = Accelerator()
        self._rank, self._world_size = self.accelerator.process_index, self.accelerator.num_processes
        check_processes(self._world_size)
        self.stats: dict[str, Stats] = {}
        self.report: dict[str, Any] | None = None
        self._load(dtype, device, device_map, system_prompt)

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
        system = None if system_prompt is None else self._resolve_system_prompt(str(system_prompt))
        self.conversation: Conversation = conversation_for(self.family, self.msd.target, base, self.options, system)
        self.answerer = Answerer(self.msd, self.conversation, self.use_msd, self.family.strips)

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
        """Answers each request, those of one task with equal settings in batches."""
        results: dict[int, GenerationResult] = {}
        asks = [self._ask(place, request) for place, request in enumerate(requests)]
        settings = {ask.place: self.settings(ask.given) for ask in asks}
        with tqdm(total=len(asks), disable=self.rank != 0, desc="Model Responding") as bar:
            for batch in batches(asks, lambda ask: _key(ask, settings[ask.place]), self.batch_size):
                prompts = [self.conversation.write(ask.context, visuals_in(ask)) for ask in batch]
                answers = self._answer(batch[0], prompts, settings[batch[0].place])
                results |= {ask.place: answer for ask, answer in zip(batch, answers, strict=True)}
                bar.update(len(batch))
        return [results[place] for place in range(len(requests))]

    def generate_until_multi_round(self, requests: Sequence[Instance]) -> list[list[str]]:
        """Answers tasks that ask on after each answer: the texts of each request's rounds.

        As in lmms-eval's own models a task's `until` does not count here.
        """
        results: dict[int, list[str]] = {}
        asks = [self._ask(place, request) for place, request in enumerate(requests)]
        settings = {ask.place: self.settings({**ask.given, "until": None}) for ask in asks}
        with tqdm(total=len(asks), disable=self.rank != 0, desc="Model Responding") as bar:
            for batch in batches(asks, lambda ask: _key(ask, settings[ask.place]), self.batch_size):
                dialogues = [Dialogue(ask.doc(), ask.doc_to_text, ask.context, visuals_in(ask)) for ask in batch]
                while talking := [dialogue for dialogue in dialogues if not dialogue.over]:
                    prompts = [self.conversation.write(each.context, each.visuals) for each in talking]
                    answers = self._answer(batch[0], prompts, settings[batch[0].place])
                    for dialogue, answer in zip(talking, answers, strict=True):
                        dialogue.hear(answer.text)
                results |= {ask.place: dialogue.answers for ask, dialogue in zip(batch, dialogues, strict=True)}
                bar.update(len(batch))
        return [results[place] for place in range(len(requests))]

    def loglikelihood(self, requests: Sequence[Instance]) -> list[tuple[float, bool]]:
        """Scores each request's continuation with the base model alone.

        Returns:
            For each request the mean negative log-likelihood of the continuation's tokens, which is what lmms-eval's
            tasks minimise, and whether greedy search would give the continuation.
        """
        results = []
        for request in tqdm(requests, disable=self.rank != 0, desc="Model Responding"):
            context, continuation, doc_to_visual, doc_id, task, split = request.args
            doc = self._doc(task, split, doc_id)
            if not isinstance(continuation, str):
                continuation = str(continuation(doc))
            prompt = self.conversation.write(context, visuals_of(doc_to_visual(doc)))
            results.append(score(self.msd.target, self.conversation, prompt, continuation))
        return results

    def settings(self, given: dict[str, Any] | None) -> GenerationSettings:
        """A task's settings, with the family's defaults."""
        return GenerationSettings.from_task(given, self.family.max_new_tokens, self.family.ignored_stops)

    def clean(self) -> None:
        """Sums the statistics and frees the models; lmms-eval calls it in every process after the last request."""
        if self.msd is None:
            return
        stats = report.gather(self.stats)
        settings: dict[str, Any] = {
            "use_msd": self.use_msd,
            **self.names,
            "dtype": str(self.msd.dtype).removeprefix("torch."),
            "tree": asdict(self.msd.tree) if self.use_msd else None,
            "draft_image_tokens": self.msd.compression.tokens if self.use_msd else None,
            "compile": self.options.loading.get("compile", False),
            "batch_size": self.batch_size,
            "processes": self.world_size,
        }
        self.report = report.build(stats, settings, self.device, self.baseline)
        if self.rank == 0:
            report.publish(self.report)
        self.msd = self.conversation = self.answerer = None  # type: ignore[assignment]
        super().clean()

    def _ask(self, place: int, request: Instance) -> Ask:
        context, given, doc_to_visual, *texts, doc_id, task, split = request.args
        doc = partial(self._doc, task, split, doc_id)
        counted = not request.metadata.get("__padding_only__")
        return Ask(place, task, context, given or {}, doc_to_visual, doc, counted, *texts)

    def _doc(self, task: str, split: str, doc_id: Any) -> Any:
        return self.task_dict[task][split][doc_id]

    def _answer(self, ask: Ask, prompts: Sequence[Prompt], settings: GenerationSettings) -> list[GenerationResult]:
        answers, stats = self.answerer.answer(prompts, settings)
        if ask.counted:
            self.stats.setdefault(ask.task, Stats.empty()).merge(stats)
        return answers


def check_processes(joined: int) -> None:
    """Raises `UserError` if processes were started together and do not know of each other."""
    started = int(os.environ.get("WORLD_SIZE", "1"))
    if started != joined:
        raise UserError(
            f"{started} processes were started, accelerate sees {joined}", fix="on CPUs set ACCELERATE_USE_CPU=true"
        )


def visuals_in(ask: Ask) -> list[Visual]:
    """What a request shows; its document is read now."""
    return visuals_of(ask.doc_to_visual(ask.doc()))


def _key(ask: Ask, settings: GenerationSettings) -> Hashable:
    """Requests of one batch share their statistics, so they are of one task, and are counted or not."""
    return ask.task, ask.counted, settings.key


class LlavaMSD(MSD):
    """LLaVA-1.5."""

    family = LLAVA


class LlavaNextMSD(MSD):
    """LLaVA-1.6."""

    family = LLAVA_NEXT


class Qwen2VLMSD(MSD):
    """Qwen2-VL."""

    family = QWEN2_VL


class Qwen2_5VLMSD(MSD):
    """Qwen2.5-VL."""

    family = QWEN2_5_VL
