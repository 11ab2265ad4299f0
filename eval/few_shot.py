"""Examples before a prompt: earlier turns of the conversation in chat, paragraphs before it in plain text.

Which examples an item gets is decided in eval.items (a task's) or by the user (`eval.sample --few-shot`).
"""

from collections.abc import Sequence

from data_tools.samples import messages_of
from data_tools.schema import Message, Text
from trainer.errors import UserError

Example = tuple[Text, Text]
"""A prompt and its answer."""


def with_examples(prompt: Text, examples: Sequence[Example], api: str) -> Text:
    """The prompt behind the examples, in their order; system messages are the prompt's own. Raises UserError."""
    if api == "completions":
        texts = [text for example in examples for text in example]
        if not isinstance(prompt, str) or not all(isinstance(text, str) for text in texts):
            raise UserError("--api completions: prompts and examples must be strings, not messages")
        return "".join(f"{asked}{answer}\n\n" for asked, answer in examples) + prompt
    turns = [Message(**message) for message in messages_of(prompt)]
    system = [turn for turn in turns[:1] if turn.role == "system"]
    earlier: list[Message] = []
    for asked, answer in examples:
        earlier += [Message(**message) for message in messages_of(asked) if message["role"] != "system"]
        earlier += [Message("assistant", answer)] if isinstance(answer, str) else list(answer)
    return tuple(system + earlier + turns[len(system) :])
