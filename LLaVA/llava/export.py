"""Writes a checkpoint of the liuhaotian layout in the layout that transformers and serving engines read.

The exported folder has the stock model, its processor, a tokenizer and a chat template. Prompt ids and answers are
those of `llava.load_pretrained`:

- The tokenizer's `<unk>` becomes `<image>`. Its id already stands for pictures (see `llava.layout`), so the vocabulary
  keeps its size and a draft of the base keeps fitting.
- LLaVA tokenises the pieces of text around pictures separately, so each piece begins with a space of its own. One
  tokenizer for the whole text does this by a normalizer.
- The chat template writes Vicuna's conversation, with the pictures of a message in front of its text.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, normalizers
from transformers import AutoProcessor, PreTrainedTokenizerFast
from transformers import LlavaProcessor as StockProcessor

from .checkpoint import load_config, load_model, load_processor, quiet_transformers
from .conversation import get_template
from .errors import UserError
from .files import atomic_folder, read_json, write_json
from .hub import Source
from .layout import open_checkpoint
from .processor import IMAGE_TOKEN, LlavaProcessor

try:
    from transformers.models.llava.image_processing_pil_llava import LlavaImageProcessorPil as PaddingProcessor
except ImportError:  # before transformers had two backends, the plain name was the PIL one
    from transformers import LlavaImageProcessor as PaddingProcessor  # type: ignore[assignment]

TEMPLATE = """
{{- bos_token -}}
{%- if messages[0]['role'] != 'system' -%}{{- SYSTEM -}}{%- endif -%}
{%- for message in messages -%}
  {%- if message['role'] == 'user' -%}{{- USER -}}
  {%- elif message['role'] == 'assistant' -%}{{- ASSISTANT + ' ' -}}
  {%- elif message['role'] != 'system' -%}{{- raise_exception('unknown role ' + message['role']) -}}
  {%- endif -%}
  {%- if message['content'] is string -%}{{- message['content'] -}}
  {%- else -%}
    {%- for part in message['content'] -%}
      {%- if part['type'] == 'image' -%}{{- IMAGE -}}{%- endif -%}
    {%- endfor -%}
    {%- for part in message['content'] -%}
      {%- if part['type'] == 'text' -%}{{- part['text'] -}}{%- endif -%}
    {%- endfor -%}
  {%- endif -%}
  {%- if message['role'] == 'assistant' -%}{{- END -}}{%- else -%}{{- SEP -}}{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- ASSISTANT -}}{%- endif -%}
"""
PROBES = (
    "A chat. USER: What is it? ASSISTANT:",
    f"A chat. USER: {IMAGE_TOKEN}\nWhat is it? ASSISTANT: A dog.</s>USER: And\nthis? ASSISTANT:",
    f"USER: {IMAGE_TOKEN}\n{IMAGE_TOKEN}\n  two{IMAGE_TOKEN} three {IMAGE_TOKEN}{IMAGE_TOKEN} ASSISTANT:",
)
"""Texts whose ids are compared before an export is finished."""


def needs_export(path: str | Path, **hub: Any) -> bool:
    """Whether a LLaVA-1.5 checkpoint is in the liuhaotian layout."""
    return open_checkpoint(Source.of(path, hub)).layout == "liuhaotian"


def export_pretrained(path: str | Path, out: str | Path, **hub: Any) -> Path:
    """Writes a checkpoint of the liuhaotian layout into the folder ``out``, in the checkpoint's own dtype.

    Args:
        path: model folder, or name of a hub repository.
        out: must not exist, or be empty.
        hub: see `llava.hub.HUB_KEYS`.

    Raises:
        UserError: it is not LLaVA-1.5 or already in transformers' layout; ``out`` has files; or the tokenizer cannot
            be written so that prompts keep their ids.
    """
    if not needs_export(path, **hub):
        raise UserError("this base model is in transformers' layout already", path, "give it to the engine as it is")
    config, processor = load_config(path, **hub), load_processor(path, **hub)
    stock = stock_processor(config, processor)
    # config.dtype, where "auto" would take float32 on a CPU that is slow in 16 bit
    model = load_model(path, dtype=config.dtype or "auto", **hub)
    model.config.architectures = [type(model).__name__]
    with atomic_folder(out) as folder, quiet_transformers():
        model.save_pretrained(folder)
        stock.save_pretrained(folder)
        name_plain_image_processor(folder)
        compare_prompts(processor, folder)
    return Path(out)


def stock_processor(config: Any, processor: LlavaProcessor) -> StockProcessor:
    """transformers' processor with the settings of ours."""
    settings = processor.image_processor.to_dict()
    image_processor: Any = processor.image_processor
    if processor.aspect == "pad":
        settings = {key: value for key, value in settings.items() if not key.endswith("_type")}
        image_processor = PaddingProcessor.from_dict({**settings, "do_pad": True})
    strategy = config.vision_feature_select_strategy
    return StockProcessor(
        image_processor=image_processor,
        tokenizer=stock_tokenizer(processor),
        patch_size=config.vision_config.patch_size,
        vision_feature_select_strategy=strategy,
        num_additional_image_tokens=1,  # CLIP's class token, which the strategy "default" leaves out again
        chat_template=chat_template(processor),
    )


def stock_tokenizer(processor: LlavaProcessor) -> PreTrainedTokenizerFast:
    """The tokenizer with `<image>` at the place of the image id, and a space in front of each piece of text."""
    tokenizer, image_id = processor.tokenizer, processor.image_token_id
    state = json.loads(tokenizer.backend_tokenizer.to_str())
    vocabulary = state["model"]["vocab"]
    vocabulary.pop(tokenizer.convert_ids_to_tokens(image_id))
    vocabulary[IMAGE_TOKEN] = image_id
    state["model"]["unk_token"] = None  # byte fallback writes every character
    state["added_tokens"] = [token for token in state["added_tokens"] if token["id"] != image_id]
    backend = Tokenizer.from_str(json.dumps(state))
    begin = tokenizer.bos_token
    spaced = lacks_space_after(tokenizer.backend_tokenizer, begin)
    if spaced:
        rules: list[Any] = [
            normalizers.Replace(Regex(rf"\A{re.escape(begin)}(?!\z)"), f"{begin} "),
            normalizers.Replace(Regex(rf"{IMAGE_TOKEN}(?!{IMAGE_TOKEN}|\z)"), f"{IMAGE_TOKEN} "),
        ]
        backend.normalizer = normalizers.Sequence([*rules, *([backend.normalizer] if backend.normalizer else [])])
    # A normalized token is looked for in the normalized text, after the rules.
    backend.add_special_tokens([AddedToken(name, normalized=spaced, special=True) for name in (begin, IMAGE_TOKEN)])
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        padding_side="left",
        clean_up_tokenization_spaces=False,
        bos_token=AddedToken(begin, normalized=spaced, special=True),
        eos_token=tokenizer.eos_token,
        pad_token=tokenizer.convert_ids_to_tokens(processor.pad_token_id),
        extra_special_tokens={"image_token": AddedToken(IMAGE_TOKEN, normalized=spaced, special=True)},
    )


def lacks_space_after(backend: Tokenizer, token: str) -> bool:
    """Whether text behind a special token is tokenised otherwise than at the beginning of a text."""
    ids = backend.encode(f"{token}a", add_special_tokens=False).ids
    return ids[1:] != backend.encode("a", add_special_tokens=False).ids


def chat_template(processor: LlavaProcessor) -> str:
    """Vicuna's conversation in Jinja."""
    template = get_template()
    user, assistant = template.roles
    values = {
        "SYSTEM": template.system + template.sep,
        "USER": f"{user}: ",
        "ASSISTANT": f"{assistant}:",
        "IMAGE": f"{IMAGE_TOKEN}\n",
        "SEP": template.sep,
        "END": processor.end_of_answer or template.sep2,
    }
    setting = "".join(f"{{%- set {name} = {json.dumps(value)} -%}}\n" for name, value in values.items())
    return setting + TEMPLATE.strip() + "\n"


def name_plain_image_processor(folder: Path) -> None:
    """Names the image processor without the suffix of its backend, so that each reader takes the backend it has."""
    for path in (folder / "processor_config.json", folder / "preprocessor_config.json"):
        if path.is_file():
            fields = read_json(path)
            part = fields.get("image_processor", fields)
            part["image_processor_type"] = part["image_processor_type"].removesuffix("Pil").removesuffix("Fast")
            write_json(path, fields)


def compare_prompts(processor: LlavaProcessor, folder: Path) -> None:
    """Raises `UserError` if the exported tokenizer gives other ids than LLaVA's for one of `PROBES`."""
    written = AutoProcessor.from_pretrained(folder).tokenizer
    mark = IMAGE_TOKEN * processor.image_token_count
    for probe in PROBES:
        text = probe.replace("</s>", processor.end_of_answer or "</s>")
        expanded = text.replace(IMAGE_TOKEN, mark)
        found = (
            written(expanded).input_ids,
            written(f"{written.bos_token}{expanded}", add_special_tokens=False).input_ids,
        )
        if list(found) != [processor.encode(text)] * 2:
            raise UserError("the exported tokenizer gives other prompt ids than the base's", folder, f"text: {text!r}")
