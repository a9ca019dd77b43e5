"""Drafts: guesses at the next tokens of those that decode, for the step's budget that nobody else wants."""

from vlm_serve.engine.block_manager import BlockManager
from vlm_serve.engine.step import Step


def grant_drafts(step: Step, blocks: BlockManager, *, most: int, stretches_from: int) -> None:
    """Grants up to `most` guesses to each sequence that has been granted the last of its known tokens, as far as budget
    and free blocks go. One that is not long has none past `DecoderConfig.stretches_from`: there it starts over.
    """
    for grant in step.granted:
        sequence = grant.sequence
        left = sequence.max_tokens - sequence.num_generated - 1
        if not sequence.is_long:
            left = min(left, stretches_from - len(sequence.token_ids))
        limit = min(most, step.budget, left)
        if limit <= 0 or not sequence.can_speculate:
            continue
        draft = sequence.propose(limit)
        while draft and not blocks.can_grow(sequence, sequence.computed + 1 + len(draft)):
            draft = draft[:-1]
        if draft:
            grant.draft = draft
            grant.blocks += blocks.grow(sequence, sequence.computed + 1 + len(draft))
            step.budget -= len(draft)
