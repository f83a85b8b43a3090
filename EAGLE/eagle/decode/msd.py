"""`MSDModel`: a target and its draft, used like a transformers model."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterable, Mapping, Sequence
from copy import copy
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import GenerationConfig, LogitsProcessorList, StoppingCriteriaList, StopStringCriteria

from eagle.decode.adaptive.cost import CONTEXTS, cost_of, two_part_from
from eagle.decode.adaptive.guard import Pace
from eagle.decode.adaptive.planner import Acceptance, CostCurve, Planner
from eagle.decode.compatibility import check_compatible
from eagle.decode.compiled.engine import LARGEST_BATCH, StaticEngine, obstacle_by_default, skipped_graphs
from eagle.decode.decoder import Decoder, DecodingSettings
from eagle.decode.generate_settings import check_call, leave_out_unsupported
from eagle.decode.noise import seeds_of
from eagle.decode.request import check_inputs, check_request
from eagle.decode.sampling import Sampler, SamplingSettings
from eagle.decode.self_check import self_check as check_target
from eagle.decode.stats import Stats
from eagle.decode.stopping import Stopper
from eagle.decode.tree_config import TreeConfig
from eagle.drafts.checkpoint import load_draft
from eagle.drafts.compression import Compression
from eagle.drafts.head import DraftHead
from eagle.families import Target, load_target
from llava.errors import UserError
from llava.generation import checked_settings
from llava.hub import HUB_KEYS
from llava.inputs import check_text
from llava.memory import within_memory

TREE_ATTENTIONS = ("auto", "two-part", "masked")
COMPILED_NOTE = f"decoding of up to {LARGEST_BATCH} sequences is compiled (compile=False or --no-compile: without)"
log = logging.getLogger(__name__)


@dataclass
class MSDOutput:
    """What `MSDModel.generate` returns.

    Attributes:
        sequences: [B, P + n] prompts and new tokens. Shorter answers are padded with the pad token.
        tokens: the new tokens of each sequence, up to and including its end token, without padding.
        stats: acceptance and times of all sequences together.
    """

    sequences: Tensor
    tokens: list[list[int]]
    stats: Stats


class MSDModel:
    """Multimodal speculative decoding of one target with one draft. Same answers as the target alone.

    Args:
        target: the base model.
        draft: its draft head. None decodes plainly.
        tree: "auto" chooses depth and size of the draft tree in each cycle, from costs that are measured once on this
            machine; a batch and ``compile`` have the default tree of the target's device instead. "auto" does not draft
            where that is slower than plain decoding. "fixed" uses the default tree in each cycle. A `TreeConfig` gives
            other bounds.
        draft_image_tokens: input rows that the draft keeps of each picture, 0 for none, "all" for all. The default is
            what the draft's config says, else all. The target always reads all, so answers do not depend on it.
        compile: run both models through `torch.compile` (`eagle.decode.compiled`) for single sequences and batches of
            at most 16, with CUDA graphs on CUDA. A string names the backend; True is "inductor". None compiles on CUDA
            if the pair can be compiled and the tree is not adaptive; `compile_note` says what was chosen there. See
            `warm_up`.
        tree_attention: "two-part" attends to cached rows without the tree's mask (`eagle.attention`), which is faster
            after a long context; "masked" attends to everything with it. "auto" measures once where two parts are
            faster. Compiled parts and layers with sliding windows are always masked.

    Raises:
        UserError: base and draft do not fit together, or a setting has an unknown value.
    """

    def __init__(
        self,
        target: Target,
        draft: DraftHead | None = None,
        tree: TreeConfig | Literal["auto", "fixed"] | None = None,
        *,
        draft_image_tokens: int | str | None = None,
        compile: bool | str | None = None,
        tree_attention: Literal["auto", "two-part", "masked"] = "auto",
    ) -> None:
        if tree_attention not in TREE_ATTENTIONS:
            raise UserError(f"tree_attention={tree_attention!r}", fix=f"give {' or '.join(TREE_ATTENTIONS)}")
        self.tree_attention = tree_attention
        self._two_part_from: dict[int, int | None] = {}
        self.target, self.draft = target, draft
        self.compile_note = ""
        self._warmed_up: set[tuple[int, TreeConfig]] = set()
        backend = "inductor" if compile is True else compile or None
        apart = None if draft is None or draft.compilable else draft.kind
        if backend and apart:
            raise UserError(f"{apart} heads are not compiled", fix="leave out compile")
        if compile is None and target.device.type == "cuda":
            adaptive = isinstance(tree, TreeConfig) and tree.adaptive
            reason = "the tree is adaptive" if adaptive else None
            reason = reason or (f"the draft is a {apart} head" if apart else obstacle_by_default(target))
            backend = None if reason else "inductor"
            self.compile_note = f"decoding is not compiled: {reason}" if reason else COMPILED_NOTE
        self.backend = backend
        """Of `torch.compile`; None if the models are not compiled."""
        guarded = tree in (None, "auto") or (isinstance(tree, TreeConfig) and tree.adaptive)
        self.tree = TreeConfig.named("fixed" if backend and guarded else tree or "auto", target.device)
        self.guarded = guarded
        self.exact_phases = False  # wait for the device at the ends of phases: exact phase times, less speed
        self._acceptance = Acceptance()  # learnt over all requests
        self._length_warned = False
        self._costs: dict[tuple[int, ...], CostCurve] = {}
        self._paces: dict[tuple[TreeConfig, int], Pace] = {}
        own = Compression() if draft is None else draft.compression
        if own is None and draft is not None and draft_image_tokens not in (None, "all"):
            raise UserError(f"draft image tokens {draft_image_tokens}: {draft.kind} heads read all", fix="leave it out")
        self.compression = (own or Compression()).replaced(draft_image_tokens)
        leave_out_unsupported(target.model.generation_config, target.config.name_or_path)
        target.prepare_for_decoding()
        if draft is not None:
            check_compatible(target, draft)
            draft.prepare_for_decoding(target.model.get_output_embeddings(), target.logit_cap)
        self._compiled = StaticEngine(target, draft, backend) if backend else None

    @classmethod
    def from_pretrained(
        cls,
        base: str | Path,
        draft: str | Path | None = None,
        *,
        dtype: Any = "auto",
        device_map: Any = None,
        tree: TreeConfig | Literal["auto", "fixed"] | None = None,
        draft_revision: str | None = None,
        draft_image_tokens: int | str | None = None,
        compile: bool | str | None = None,
        tree_attention: Literal["auto", "two-part", "masked"] = "auto",
        self_check: bool = True,
        **kwargs: Any,
    ) -> MSDModel:
        """Loads a base model and its draft from folders or the hub.

        Args:
            base, draft: folder or hub name. Without ``draft`` the model decodes plainly.
            dtype: of both models. "auto" is that of the base checkpoint, or float32 on a CPU that is slow in 16 bit.
            device_map: as in transformers. The draft is loaded to the device of the base's ``lm_head``.
            tree, draft_image_tokens, compile, tree_attention: as for the class.
            draft_revision: hub revision of the draft (``revision`` is the base's).
            self_check: compare the engine with transformers' `generate` on one short prompt, unless this base passed
                before (`eagle.decode.self_check`).
            kwargs: as `eagle.families.load_target`.

        Raises:
            UserError: a checkpoint is missing or broken, base and draft do not fit together, or the engine does not
                give the base's answers.
        """
        if device_map == "meta":
            raise UserError("device map 'meta' does not read the weights", fix="name a device, such as cpu or cuda:0")
        target = load_target(base, dtype=dtype, device_map=device_map, **kwargs)
        settings: dict[str, Any] = {"draft_image_tokens": draft_image_tokens, "compile": compile}
        settings["tree_attention"] = tree_attention
        hub = {key: kwargs[key] for key in HUB_KEYS if key in kwargs and key != "revision"}
        if draft_revision is not None:
            hub["revision"] = draft_revision
        head = None if draft is None else load_draft(draft, dtype=target.dtype, device=target.head_device, **hub)
        model = cls(target, head, tree, **settings)
        if self_check:
            check_target(target)
        return model

    @property
    def processor(self) -> Any:
        return self.target.processor

    @property
    def tokenizer(self) -> Any:
        return self.target.tokenizer

    @property
    def device(self) -> torch.device:
        return self.target.device

    @property
    def dtype(self) -> torch.dtype:
        return self.target.dtype

    @property
    def tree(self) -> TreeConfig:
        """Bounds of the tree of a single sequence. If they are set, each cycle drafts, unless they are adaptive."""
        return self._tree

    @tree.setter
    def tree(self, tree: TreeConfig) -> None:
        self._tree, self.guarded = tree, tree.adaptive

    @property
    def compiled(self) -> bool:
        """Whether both models run through `torch.compile`."""
        return self._compiled is not None

    @torch.inference_mode()
    def warm_up(self, positions: int = 1, progress: bool = True, batch_sizes: Iterable[int] = (1,)) -> None:
        """Does what otherwise slows the first request: compiles both models if they are compiled, and measures the
        costs of an adaptive tree. Nothing is compiled later, whatever prompts and trees are asked for, and whatever
        sequences of a batch end. `generate` calls it before its first compiled request of a batch size.

        Args:
            positions: of the longest request, prompt and answer. Only CUDA graphs depend on it.
            progress: show a bar.
            batch_sizes: numbers of sequences of the requests, at most 16. Larger batches are not compiled.

        Raises:
            UserError: ``positions`` or a size is not a whole number in its range, or there is no size.
        """
        if type(positions) is not int or positions < 1:
            raise UserError(f"warm_up: positions={positions!r}", fix="give a whole number of at least 1")
        sizes = checked_sizes(batch_sizes)
        if 1 in sizes:
            self._costs_of(self._bounds(None, 1), 1)
        if self._compiled is None:
            return
        engine, skipped = self._compiled, skipped_graphs()
        trees = {size: self._bounds(None, size) for size in sizes}
        self._warmed_up |= {(engine.sizes_of(size), tree) for size, tree in trees.items()}

        def compiled() -> bool:
            engine.warm_up(trees, positions, progress)
            return True

        if not within_memory(compiled):
            log.warning("out of memory while compiling: some requests will be answered without")
        if (count := skipped_graphs() - skipped) > 0:
            log.warning("%d CUDA graphs were skipped, so decoding is slow: TORCH_LOGS=cudagraphs says why", count)

    def _is_warm(self, batch: int) -> bool:
        """Whether `warm_up` has nothing to compile for such a batch."""
        if self._compiled is None or batch > LARGEST_BATCH:
            return True
        return (self._compiled.sizes_of(batch), self._bounds(None, batch)) in self._warmed_up

    def generate(
        self,
        input_ids: Tensor,
        *,
        use_msd: bool = True,
        tree: TreeConfig | None = None,
        temperature: float | None = None,
        do_sample: bool | None = None,
        seed: int | Sequence[int] | None = None,
        stop_strings: str | Sequence[str] | None = None,
        stopping_criteria: Sequence[Any] | None = None,
        streamer: Any = None,
        plain_rows: int = 1,
        one_row_ties: bool = False,
        **kwargs: Any,
    ) -> MSDOutput:
        """Generates as `target.model.generate` would, several tokens per forward.

        Args:
            input_ids: [B, P] with one id for each image feature. ``kwargs`` has the processor's other outputs, among
                them an ``attention_mask`` if prompts are padded.
            use_msd: False decodes plainly, in the same loop.
            tree: bounds of each sequence's tree, for this call only. The default is `tree_for`.
            temperature: 0 is greedy. None uses the checkpoint's generation config, as in transformers.
            seed: makes sampling repeatable and independent of the global random state. One, or one for each sequence.
                The answer to a seed does not depend on draft, tree or batch, except for rounding.
            stop_strings: texts that end the answer, in place of those of the checkpoint's generation config.
            streamer: a transformers streamer, for a single prompt.
            plain_rows: with ``use_msd=False``, rows of each forward, of which all but one are padding. In 16 bit such
                answers round as those of trees with so many nodes.
            one_row_ties: in greedy decoding of a single prompt, decides between two logits that are at most two steps
                of the dtype apart with a forward of one row, as plain decoding does.
            kwargs: model inputs, and any setting of transformers' `generate` for greedy search or sampling. As there,
                None switches off a setting of the checkpoint's generation config.

        Raises:
            UserError: an input has a wrong type or shape, or a setting a value that is wrong or not served.
        """
        check_inputs(self.target, input_ids, kwargs.get("attention_mask"))
        check_call(kwargs)
        known = self.target.model.generation_config
        off = [name for name, value in kwargs.items() if value is None and hasattr(known, name)]
        named = {"temperature": temperature, "do_sample": do_sample, "stop_strings": stop_strings}
        kwargs.update(checked_settings({**kwargs, **named}))
        temperature, do_sample, stop_strings = (kwargs.pop(name, None) for name in named)
        if temperature is not None and do_sample is None:
            do_sample = not SamplingSettings(temperature).greedy
        if do_sample:
            kwargs["temperature"] = temperature
        elif do_sample is False:
            kwargs.update(temperature=None, top_p=None, top_k=None)
        if (config := kwargs.get("generation_config")) is not None:
            kwargs["generation_config"] = config = copy(config)
            for name, value in checked_settings(vars(config)).items():
                setattr(config, name, value)
            stop_strings = config.stop_strings if stop_strings is None else stop_strings
            config.stop_strings = None
        criteria = StoppingCriteriaList([*(stopping_criteria or []), *self._stop_at(stop_strings)])
        rows: dict[str, Any] = {"plain_rows": plain_rows, "one_row_ties": one_row_ties}
        self._check_rows(input_ids.shape[0], use_msd, plain_rows, one_row_ties)
        decode = partial(self._decode, use_msd=use_msd, tree=tree, seed=seed, bound_streamer=streamer, **rows)
        kwargs.update(self.target.complete_inputs(input_ids, kwargs), do_sample=do_sample)
        settings = {key: value for key, value in kwargs.items() if value is not None or key in off}
        if use_msd:  # measured at first use, before the clock starts
            bounds = self._bounds(tree, input_ids.shape[0])
            self._costs_of(bounds, input_ids.shape[0])
            self._two_parts_from(bounds, input_ids.shape[1])
        if not self._is_warm(input_ids.shape[0]):
            self.warm_up(batch_sizes=[input_ids.shape[0]])
        start = time.perf_counter()
        output = self.target.model.generate(
            input_ids=input_ids, stopping_criteria=criteria, custom_generate=decode, **settings
        )
        output.stats.seconds = time.perf_counter() - start
        output.stats.first_token = output.stats.first_token_at - start
        return output

    def _check_rows(self, batch: int, use_msd: bool, plain_rows: int, one_row_ties: bool) -> None:
        """Raises `UserError` if the rows of a forward cannot be as asked for."""
        if type(plain_rows) is not int or plain_rows < 1 or (use_msd and plain_rows > 1):
            raise UserError(f"plain_rows={plain_rows!r}", fix="give a whole number of at least 1, with use_msd=False")
        if one_row_ties and batch > 1:
            raise UserError(f"one_row_ties with {batch} prompts", fix="give one prompt, or leave it out")
        if (plain_rows > 1 or one_row_ties) and (self._compiled is not None or not self.target.verifies_trees):
            why = "compiled parts choose their own rows" if self._compiled else "this target verifies chains only"
            raise UserError(f"plain_rows or one_row_ties: {why}", fix="decode with compile=False, or leave them out")

    def _stop_at(self, texts: str | Sequence[str] | None) -> list[StopStringCriteria]:
        """The criterion of these stop strings; None for those of the checkpoint."""
        texts = self.target.stop_strings if texts is None else [texts] if isinstance(texts, str) else texts
        for text in texts:
            check_text(text, "stop string")
        return [StopStringCriteria(self.tokenizer, list(texts))] if texts else []

    def __call__(
        self, model: Any, input_ids: Tensor, streamer: Any = None, stop_strings: Any = None, **kwargs: Any
    ) -> MSDOutput | Tensor:
        """For ``target.generate(**inputs, custom_generate=msd)``. Returns the sequences, or an `MSDOutput` with
        ``return_dict_in_generate``. transformers does not pass its streamer to such a function: use
        ``custom_generate=partial(msd, streamer=s)``."""
        texts = checked_settings({"stop_strings": stop_strings}).get("stop_strings")
        kwargs["stopping_criteria"] = StoppingCriteriaList([*kwargs["stopping_criteria"], *self._stop_at(texts)])
        output = self._decode(model, input_ids, use_msd=True, tree=None, seed=None, bound_streamer=streamer, **kwargs)
        return output if kwargs["generation_config"].return_dict_in_generate else output.sequences

    @torch.inference_mode()
    def _decode(
        self,
        model: Any,
        input_ids: Tensor,
        logits_processor: LogitsProcessorList,
        stopping_criteria: StoppingCriteriaList,
        generation_config: GenerationConfig,
        *,
        use_msd: bool,
        tree: TreeConfig | None,
        seed: int | Sequence[int] | None,
        bound_streamer: Any,
        plain_rows: int = 1,
        one_row_ties: bool = False,
        **model_inputs: Any,
    ) -> MSDOutput:
        """Called by transformers' `generate` after it has prepared inputs, processors and criteria."""
        check_request(self.target, input_ids, generation_config, bound_streamer, model_inputs)
        if one_row_ties and generation_config.do_sample:
            raise UserError("one_row_ties is for greedy decoding", fix="give temperature=0, or leave it out")
        stopper = Stopper(stopping_criteria, input_ids.shape[1])
        inputs = {"input_ids": input_ids, **model_inputs}
        self._warn_of_length(inputs, stopper.max_new_tokens)
        if bound_streamer is not None:
            bound_streamer.put(input_ids.cpu())
        batch = input_ids.shape[0]
        guarded = self.guarded if tree is None else tree.adaptive
        tree = self._bounds(tree, batch)
        draft = self.draft if use_msd and tree.total_tokens > 1 else None
        settings = DecodingSettings(
            sampler=Sampler(logits_processor, generation_config.do_sample),
            stopper=stopper,
            tree=tree,
            planner=None if draft is None else self._planner_for(tree, batch),
            pace=partial(self._pace, tree) if guarded else None,
            compression=self.compression,
            compiled=self._compiled,
            streamer=bound_streamer,
            wait=self.target.synchronize if self.exact_phases else None,
            seeds=None if seed is None else tuple(seeds_of(seed, batch)),
            plain_rows=plain_rows,
            one_row_ties=one_row_ties and draft is not None,
            two_part_from=None if draft is None else self._two_parts_from(tree, input_ids.shape[1]),
        )
        decoder = Decoder(self.target, draft, inputs, settings)
        tokens = decoder.run()
        answers = [torch.tensor(each, dtype=input_ids.dtype, device=input_ids.device) for each in tokens]
        padded = pad_sequence(answers, batch_first=True, padding_value=generation_config.pad_token_id or 0)
        return MSDOutput(torch.cat([input_ids, padded], dim=1), tokens, decoder.stats)

    def _bounds(self, tree: TreeConfig | None, batch: int) -> TreeConfig:
        """The tree of a request: no deeper than a block head drafts; a chain if the target verifies nothing else."""
        if tree is not None and not isinstance(tree, TreeConfig):
            raise UserError(f"tree={tree!r}", fix='give a TreeConfig; MSDModel itself takes "auto" and "fixed"')
        tree = tree or self.tree_for(batch)
        if self.draft is not None and self.draft.block_size > 1:
            tree = replace(tree, depth=min(tree.depth, self.draft.block_size - 1))
        return tree if self.target.verifies_trees else tree.as_chain()

    def _warn_of_length(self, inputs: Mapping[str, Any], new_tokens: int) -> None:
        """Warns, once for a model, if prompt and answer may have more positions than the model is made for."""
        if self._length_warned:
            return
        try:
            self.target.check_length(inputs, new_tokens)
        except UserError as error:
            self._length_warned = True
            log.warning("%s: answers may get worse", error)

    def tree_for(self, batch: int) -> TreeConfig:
        """The default tree of each sequence of a batch. Adaptive trees are for a single sequence only."""
        device = self.target.device
        tree = TreeConfig.for_device(device) if batch > 1 and self.tree.adaptive else self.tree
        return tree.for_batch(batch, device)

    def _planner_for(self, tree: TreeConfig, batch: int) -> Planner | None:
        """The planner of a single sequence. None if trees are fixed."""
        cost = self._costs_of(tree, batch)
        if cost is None:
            return None
        return Planner(cost, min(tree.total_tokens, cost.nodes[-1]), self._acceptance, self._pace(tree, 1))

    def _pace(self, tree: TreeConfig, sequences: int) -> Pace:
        """Durations of cycles with so many sequences, known from all requests."""
        return self._paces.setdefault((tree, sequences), Pace())

    @torch.inference_mode()
    def _costs_of(self, tree: TreeConfig, batch: int) -> CostCurve | None:
        """The costs for an adaptive tree, measured at first use. None for other trees."""
        if self.draft is None or not tree.adaptive or batch > 1:
            return None
        bounds = (tree.depth, tree.top_k, tree.total_tokens)
        if bounds not in self._costs:
            self._costs[bounds] = cost_of(self.target, self.draft, tree)
        return self._costs[bounds]

    @torch.inference_mode()
    def _two_parts_from(self, tree: TreeConfig, prompt: int) -> int | None:
        """Cached rows from which trees are verified in two parts after a prompt of so many positions. Measured at first
        use; None for never."""
        if self.draft is None or self._compiled is not None or not self.target.takes_two_parts:
            return None
        if self.tree_attention != "auto":
            return 1 if self.tree_attention == "two-part" else None
        if prompt < CONTEXTS[0]:
            return None
        if tree.total_tokens not in self._two_part_from:
            self._two_part_from[tree.total_tokens] = two_part_from(self.target, tree.total_tokens)
        return self._two_part_from[tree.total_tokens]


def checked_sizes(given: Any) -> list[int]:
    """The batch sizes of `MSDModel.warm_up`, as a list.

    Raises:
        UserError: they are no collection of whole numbers from 1 to `LARGEST_BATCH`, or none.
    """
    where, fix = "batch_sizes of warm_up", f"give a list of whole numbers from 1 to {LARGEST_BATCH}"
    if isinstance(given, str | bytes) or not isinstance(given, Iterable):
        raise UserError(f"{given!r} is no list", where, fix)
    sizes = list(given)
    if not sizes:
        raise UserError("no size", where, fix)
    for size in sizes:
        if type(size) is not int or size < 1:
            raise UserError(f"{size!r} is no batch size", where, fix)
        if size > LARGEST_BATCH:
            fix = "leave it out: such batches are decoded without"
            raise UserError(f"{size} is more than {LARGEST_BATCH}, the largest batch that is compiled", where, fix)
    return sizes
