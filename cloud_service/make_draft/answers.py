"""The target's own answers, for an adapter to learn from: what it will have to draft."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import torch

from cloud_service.make_draft.early_exit import Target
from shared.errors import InvalidSetting
from shared.json_lines import numbered_lines

_CPU_ROWS = 16
_GPU_ROWS = 1024
"""Questions that are answered together. A GPU's step takes as long for a thousand rows as for one until
memory is what it waits for, so that fewer steps are all that counts there."""
_GPU_WINDOW = 4 * _GPU_ROWS
"""Questions that are sorted by length, so that little is padded; a killed run loses no more than these."""
_BYTES_PER_TOKEN = 1 << 18
"""Of a GPU's free memory. The default target keeps 28 KiB of each, and some 60 more for a moment."""


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
    window = _CPU_ROWS if target.device.type == "cpu" else _GPU_WINDOW
    while len(texts) < len(questions):
        asked = questions[len(texts) : len(texts) + window]
        chats = [
            str(
                tokenizer.apply_chat_template(
                    [{"role": "user", "content": question}], tokenize=False, add_generation_prompt=True
                )
            )
            for question in asked
        ]
        answers: dict[int, str] = {}
        for rows in _batches([len(target.encode(chat)) for chat in chats], max_tokens, target.device):
            answers |= zip(rows, _answers(target, [chats[row] for row in rows], max_tokens), strict=True)
            report(len(texts) + len(answers))
        with kept.open("a", encoding="utf-8") as file:
            for row, (question, chat) in enumerate(zip(asked, chats, strict=True)):
                texts.append(chat + answers[row])
                file.write(json.dumps({"question": question, "text": texts[-1]}, ensure_ascii=False) + "\n")
    return texts


def _batches(lengths: Sequence[int], max_tokens: int, device: torch.device) -> Iterator[list[int]]:
    """Which prompts are answered together: similar lengths, as many as memory allows, the longest first."""
    order = sorted(range(len(lengths)), key=lambda row: -lengths[row])
    while order:
        num_rows = _CPU_ROWS
        if device.type == "cuda":
            torch.cuda.empty_cache()  # what the batch before has left counts as free
            room = torch.cuda.mem_get_info(device)[0] // _BYTES_PER_TOKEN
            num_rows = max(1, min(_GPU_ROWS, room // (lengths[order[0]] + max_tokens)))
        yield order[:num_rows]
        order = order[num_rows:]


def _answers(target: Target, chats: Sequence[str], max_tokens: int) -> list[str]:
    tokenizer = target.tokenizer
    read = tokenizer(list(chats), return_tensors="pt", padding=True, add_special_tokens=False)
    made = target.model.generate(**read.to(target.device), max_new_tokens=max_tokens, do_sample=False)
    return list(tokenizer.batch_decode(made[:, read["input_ids"].shape[1] :], skip_special_tokens=True))


def _read(kept: Path, questions: Sequence[str]) -> list[str]:
    if not kept.is_file():
        return []
    # A line that a kill cut short is made again.
    raw = kept.read_bytes()
    whole = raw[: raw.rfind(b"\n") + 1]
    kept.write_bytes(whole)
    rows = [json.loads(line) for _, line in numbered_lines(whole.decode())]
    if [row["question"] for row in rows] != list(questions[: len(rows)]):
        raise InvalidSetting(f"{kept} holds answers to other questions: remove it or write elsewhere")
    return [row["text"] for row in rows]
