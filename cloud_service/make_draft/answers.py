"""The target's own answers, for an adapter to learn from: what it will have to draft."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path

from cloud_service.make_draft.early_exit import Target
from shared.errors import InvalidSetting

_BATCH = 16
"""Questions that are answered together."""


def answered(
    target: Target, questions: Sequence[str], max_tokens: int, kept: Path, report: Callable[[int], None]
) -> list[str]:
    """Each question in the target's chat template, with its greedy answer.

    Args:
        max_tokens: of an answer.
        kept: JSON lines that grow as answers are made; those that are there are not made again.
        report: told how many questions are answered.
    Raises:
        InvalidSetting: `kept` holds answers to other questions.
    """
    tokenizer = target.tokenizer
    tokenizer.padding_side = "left"
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    texts = _read(kept, questions)
    report(len(texts))
    while len(texts) < len(questions):
        asked = questions[len(texts) : len(texts) + _BATCH]
        chats = [
            tokenizer.apply_chat_template(
                [{"role": "user", "content": question}], tokenize=False, add_generation_prompt=True
            )
            for question in asked
        ]
        read = tokenizer(chats, return_tensors="pt", padding=True, add_special_tokens=False)
        read = read.to(next(target.model.parameters()).device)
        made = target.model.generate(**read, max_new_tokens=max_tokens, do_sample=False)
        answers = tokenizer.batch_decode(made[:, read["input_ids"].shape[1] :], skip_special_tokens=True)
        with kept.open("a", encoding="utf-8") as file:
            for question, chat, answer in zip(asked, chats, answers, strict=True):
                texts.append(chat + answer)
                file.write(json.dumps({"question": question, "text": texts[-1]}, ensure_ascii=False) + "\n")
        report(len(texts))
    return texts


def _read(kept: Path, questions: Sequence[str]) -> list[str]:
    if not kept.is_file():
        return []
    # A line that a kill cut short is made again.
    whole = [line for line in kept.read_text("utf-8").splitlines(keepends=True) if line.endswith("\n")]
    kept.write_text("".join(whole), "utf-8")
    rows = [json.loads(line) for line in whole]
    if [row["question"] for row in rows] != list(questions[: len(rows)]):
        raise InvalidSetting(f"{kept} holds answers to other questions: remove it or write elsewhere")
    return [row["text"] for row in rows]
