"""Answer one prompt, with or without pictures."""

from __future__ import annotations

import argparse
import json
import sys

from eagle.arguments import add_length_option, add_model_options, add_sampling_options


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of `msd generate`."""
    add_model_options(parser)
    parser.set_defaults(compile=False)  # one answer is not worth it
    parser.add_argument("--image", action="append", default=[], metavar="FILE", help="picture; may be repeated")
    parser.add_argument("--prompt", required=True, help="the question")
    parser.add_argument("--raw-prompt", action="store_true", help="use the prompt as given, without the chat template")
    parser.add_argument("--system", help="system prompt instead of the template's own")
    add_length_option(parser)
    add_sampling_options(parser)
    parser.add_argument("--stop", action="append", default=[], metavar="TEXT", help="ends the answer; may be repeated")
    parser.add_argument("--no-msd", action="store_true", help="plain decoding with the base model alone")
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of streaming text")


def run(arguments: argparse.Namespace) -> int:
    """Streams the answer, then one line of statistics; or prints one JSON object."""
    from transformers import TextStreamer

    from eagle.loading import load_model, sampling_settings

    model = load_model(arguments, need_draft=not arguments.no_msd)
    target, prompt = model.target, arguments.prompt
    if not (arguments.image or arguments.raw_prompt or arguments.json):
        print("note: no --image, so the base model sees only the text", file=sys.stderr)
    if not arguments.raw_prompt:
        prompt = target.chat_prompt(prompt, num_images=len(arguments.image), system=arguments.system)
    inputs = target.prepare(prompt, arguments.image)
    target.check_length(inputs)
    streamer = None if arguments.json else TextStreamer(target.tokenizer, skip_prompt=True, skip_special_tokens=True)
    output = model.generate(
        **inputs,
        use_msd=not arguments.no_msd,
        max_new_tokens=arguments.max_new_tokens,
        stop_strings=arguments.stop or None,
        streamer=streamer,
        **sampling_settings(arguments),
    )
    (ids,), stats = output.tokens, output.stats
    if not arguments.json:
        cut = f", {stats.cut_trees} trees halved for lack of memory" if stats.cut_trees else ""
        print(f"[{stats.new_tokens} tokens, {stats.cycles} cycles, τ {stats.tau:.2f}, {stats.seconds:.2f} s{cut}]")
        return 0
    report = {
        "text": target.tokenizer.decode(ids, skip_special_tokens=True),
        "token_ids": ids,
        "new_tokens": stats.new_tokens,
        "tau": stats.tau,
        "cycles": stats.cycles,
        "seconds": stats.seconds,
        "accept_lengths": stats.accept_lengths,
    }
    print(json.dumps(report, ensure_ascii=False))
    return 0
