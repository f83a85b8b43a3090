"""Conversation templates of LLaVA-1.5: from turns to the prompt text the model was trained on.

    conversation = get_template("vicuna_v1")
    conversation.append("USER", "<image>\\nWhat is this?")
    conversation.append("ASSISTANT", None)
    conversation.prompt()     # "A chat between ... questions. USER: <image>\\nWhat is this? ASSISTANT:"

Works on text only; `<image>` in a message is not expanded here.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

from .errors import UserError

DEFAULT_TEMPLATE = "vicuna_v1"


@dataclass
class Conversation:
    """A template and its turns. `sep` follows the system prompt and each user turn, `sep2` each answer."""

    name: str
    system: str
    roles: tuple[str, str]
    sep: str
    sep2: str
    messages: list[tuple[str, str | None]] = field(default_factory=list)

    def append(self, role: int | str, text: str | None) -> None:
        """Adds a turn.

        Args:
            role: 0 or 1 (user, assistant), or the role's name.
            text: the message; None leaves the turn open for the model.

        Raises:
            UserError: the template has no such role.
        """
        if isinstance(role, int) and 0 <= role < len(self.roles):
            role = self.roles[role]
        if role not in self.roles:
            raise UserError("unknown role", str(role), f"template {self.name} has {', '.join(self.roles)}")
        self.messages.append((role, text))

    def prompt(self) -> str:
        """The conversation as text; an open last turn ends it with `ASSISTANT:`."""
        parts = [self.system, self.sep]
        for role, text in self.messages:
            if text is None:
                parts.append(f"{role}:")
            else:
                parts.append(f"{role}: {text}{self.sep if role == self.roles[0] else self.sep2}")
        return "".join(parts)


def _chat(name: str, person: str) -> Conversation:
    system = (
        f"A chat between a curious {person} and an artificial intelligence assistant. "
        f"The assistant gives helpful, detailed, and polite answers to the {person}'s questions."
    )
    return Conversation(name, system, roles=("USER", "ASSISTANT"), sep=" ", sep2="</s>")


TEMPLATES = {template.name: template for template in (_chat("vicuna_v1", "user"), _chat("llava_v1", "human"))}


def get_template(name: str = DEFAULT_TEMPLATE, system: str | None = None) -> Conversation:
    """An empty conversation of the template `name`; `system` replaces its system prompt.

    Raises:
        UserError: there is no such template.
    """
    if name not in TEMPLATES:
        raise UserError("unknown conversation template", name, f"known: {', '.join(TEMPLATES)}")
    template = TEMPLATES[name]
    return replace(template, system=template.system if system is None else system, messages=[])


def write_turns(
    turns: Sequence[tuple[str, str | None]],
    system: str | None = None,
    template: str = DEFAULT_TEMPLATE,
    end: str | None = None,
) -> str:
    """Turns (question, answer) as text; an answer None leaves the turn open. `end`: end token instead of `sep2`."""
    conversation = get_template(template, system)
    conversation.sep2 = conversation.sep2 if end is None else end
    for question, answer in turns:
        conversation.append(0, question)
        conversation.append(1, answer)
    return conversation.prompt()


def build_prompt(
    question: str,
    history: Sequence[tuple[str, str]] = (),
    system: str | None = None,
    template: str = DEFAULT_TEMPLATE,
) -> str:
    """Prompt of `question` after the turns of `history` (question, answer), open for the model's answer."""
    return write_turns([*history, (question, None)], system, template)
