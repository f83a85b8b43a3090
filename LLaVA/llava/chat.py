"""Chat with LLaVA-1.5 about pictures in the terminal.

    python -m llava.chat --model-path liuhaotian/llava-v1.5-7b --image-file cat.jpg
    python -m llava.chat --model-path FOLDER --image-file cat.jpg --prompt "What is this?"

Reads one question per line from stdin, keeps the conversation, and streams each answer to stdout. Ctrl-D ends it.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

from .arguments import OneLineParser, is_greedy, positive, temperature
from .conversation import DEFAULT_TEMPLATE, get_template
from .errors import UserError, run_cli
from .image import load_image
from .inputs import seed_option

if TYPE_CHECKING:
    import torch
    from PIL import Image
    from transformers import LlavaForConditionalGeneration

    from .processor import LlavaProcessor


class Chat:
    """One conversation: the pictures of its first question, and the turns so far."""

    def __init__(
        self,
        model: LlavaForConditionalGeneration,
        processor: LlavaProcessor,
        images: Sequence[Image.Image],
        template: str | None = None,
        system: str | None = None,
        generation: dict[str, Any] | None = None,
    ) -> None:
        self.model = model
        self.processor = processor
        self.images = list(images)
        self.template = template
        self.system = system
        self.generation = generation or {}
        self.history: list[tuple[str, str]] = []

    def ask(self, question: str) -> str:
        """Streams the answer to stdout, adds the turn to the history and returns the answer."""
        import torch
        from transformers import TextStreamer

        if not self.history and self.images:
            marks = f"{self.processor.image_token}\n" * len(self.images)
            question = question if self.processor.image_token in question else marks + question
        prompt = self.processor.chat_prompt(
            question,
            num_images=question.count(self.processor.image_token),
            history=self.history,
            system=self.system,
            template=self.template,
        )
        inputs = self.processor(text=prompt, images=self.images or None).to(self.model.device)
        streamer = TextStreamer(self.processor.tokenizer, skip_prompt=True, skip_special_tokens=True)
        with torch.inference_mode():
            output = self.model.generate(**inputs, streamer=streamer, **self.generation)
        answer = self.processor.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True).strip()
        self.history.append((question, answer))
        return answer


def main(arguments: Sequence[str] | None = None) -> int:
    """Command line; returns the exit status."""
    options = _parser().parse_args(arguments)
    import torch

    from .checkpoint import load_pretrained

    if options.conv_mode is not None:
        get_template(options.conv_mode)
    images = [load_image(path) for path in options.image_file]
    device = _device(options.device)
    if options.seed is not None:
        torch.manual_seed(options.seed)
    # straight to the device: loaded by way of the CPU, "auto" would be the CPU's dtype
    device_map = None if device.type == "cpu" else {"": device}
    model, processor = load_pretrained(options.model_path, dtype=options.dtype, device_map=device_map)
    sampled = not is_greedy(options.temperature)
    generation: dict[str, Any] = {"max_new_tokens": options.max_new_tokens, "do_sample": sampled}
    if sampled:
        generation |= {"temperature": options.temperature, "top_p": options.top_p, "top_k": 0}
    chat = Chat(model, processor, images, options.conv_mode, options.system, generation)
    if options.prompt is not None:
        chat.ask(options.prompt)
        return 0
    for question in _questions():
        try:
            chat.ask(question)
        except UserError as error:  # a bad line does not end the conversation
            print(f"error: {error}", file=sys.stderr)
    return 0


def _questions() -> Iterator[str]:
    """Non-empty lines of stdin, with a prompt on a terminal."""
    interactive = sys.stdin.isatty()
    while True:
        if interactive:
            print("USER: ", end="", flush=True)
        line = sys.stdin.readline()
        if not line:
            return
        if line.strip():
            if interactive:
                print("ASSISTANT: ", end="", flush=True)
            yield line.strip()


def _device(name: str | None) -> torch.device:
    """The device of this name; without a name CUDA or MPS if available, else the CPU."""
    import torch

    if name is None:
        name = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    try:
        device = torch.device(name)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise UserError("device cannot be used", name, str(error).splitlines()[0]) from None
    return device


def _parser() -> argparse.ArgumentParser:
    parser = OneLineParser(prog="python -m llava.chat", description="Chat with LLaVA-1.5 about pictures.")
    add = parser.add_argument
    add("--model-path", required=True, help="model folder or hub repository, liuhaotian or llava-hf layout")
    add("--image-file", action="append", default=[], help="picture of the first question; repeat it for more")
    add("--prompt", help="answer this one question and exit")
    add("--conv-mode", help=f"conversation template (default: the checkpoint's own, else {DEFAULT_TEMPLATE})")
    add("--system", help="system prompt instead of the template's")
    add("--max-new-tokens", type=positive, default=512, help="longest answer in tokens (default: %(default)s)")
    add("--temperature", type=temperature, default=0.2, help="0 is greedy decoding (default: %(default)s)")
    add("--top-p", type=_probability, default=1.0, help="nucleus sampling (default: %(default)s)")
    add("--seed", type=seed_option, help="seed of sampling")
    add("--dtype", default="auto", choices=("auto", "float32", "bfloat16", "float16"), help="default: %(default)s")
    add("--device", help="cuda, cuda:1, mps, cpu (default: CUDA or MPS if available)")
    return parser


def _probability(text: str) -> float:
    if not 0 < (value := float(text)) <= 1:
        raise argparse.ArgumentTypeError(f"{text} is not in (0, 1]")
    return value


if __name__ == "__main__":
    sys.exit(run_cli(main))
