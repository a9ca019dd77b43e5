"""Studies as tokens: the prompt exactly as the server sends it, then the report, then the end of the turn."""

from collections.abc import Sequence
from dataclasses import dataclass

from tokenizers import Tokenizer

from vlm_serve.errors import InvalidRequestError
from vlm_serve.families.base import ModelFamily
from vlm_serve.training.dataset import Study
from vlm_serve.types import ChatInput, ChatMessage, ImageInputs, ImagePart, TextPart


@dataclass(frozen=True, slots=True)
class Example:
    """One study. `token_ids` are those of the prompt, with the placeholders of its images, and from
    `answer_start` on those of the answer. `image_offsets` say where each image's placeholders begin, `image_rows`
    which row of the features is its own.
    """

    token_ids: tuple[int, ...]
    answer_start: int
    image_offsets: tuple[int, ...]
    image_rows: tuple[int, ...]

    @property
    def answer_tokens(self) -> int:
        return len(self.token_ids) - self.answer_start


def study_chat(study: Study, images: Sequence[ImagePart]) -> ChatInput:
    """The request that a study stands for: its images before the first question, its prompt as the last."""
    messages = []
    for question, answer in study.history:
        messages += [ChatMessage("user", (TextPart(question),)), ChatMessage("assistant", (TextPart(answer),))]
    messages.append(ChatMessage("user", (TextPart(study.prompt),)))
    messages[0] = ChatMessage("user", (*images, *messages[0].content))
    return ChatInput(tuple(messages))


def make_examples(family: ModelFamily, studies: Sequence[Study], tokens_per_image: int) -> list[Example]:
    """Examples in the order of the studies; image rows count through all their images.

    Args:
        family: renders the prompts.
        tokens_per_image: rows that the projector gives for one image.

    Raises:
        InvalidRequestError: a study's prompt and report are longer than the model's context; names its id.
    """
    # A report's words stay words, even such that look like a token that ends a turn.
    tokenizer = Tokenizer.from_str(family.backend_tokenizer.to_str())
    tokenizer.encode_special_tokens = True
    end = end_of_turn(family)
    inputs = ImageInputs({}, (), tokens_per_image, "")
    examples = []
    row = 0
    for study in studies:
        count = len(study.images)
        chat = study_chat(study, [ImagePart(b"", "")] * count)
        rendered = family.render_chat(chat, [(inputs,)] * count)
        prompt = rendered.token_ids
        answer = tokenizer.encode(study.report, add_special_tokens=False).ids
        total = len(prompt) + len(answer) + 1
        if total > family.decoder_config.max_positions:
            raise InvalidRequestError(
                f"Study {study.id!r} has {total} tokens with its images and report; the model's context holds "
                f"{family.decoder_config.max_positions}. Give it fewer images or a shorter report."
            )
        offsets = tuple(span.offset for span in rendered.images)
        examples.append(Example((*prompt, *answer, end), len(prompt), offsets, tuple(range(row, row + count))))
        row += count
    return examples


def end_of_turn(family: ModelFamily) -> int:
    """The token by which the chat template ends an assistant's turn; the tokenizer's own where it writes none."""

    def render(*turns: tuple[str, str]) -> tuple[int, ...]:
        messages = tuple(ChatMessage(role, (TextPart(text),)) for role, text in turns)
        return family.render_chat(ChatInput(messages), []).token_ids

    question = ("user", "Hello.")
    prompt = render(question)
    after = render(question, ("assistant", "Hello."), question)[len(prompt) :]
    endings = family.eos_token_ids
    fallback = family.tokenizer.eos_token_id
    return next((token for token in after if token in endings), fallback if fallback in endings else endings[0])
