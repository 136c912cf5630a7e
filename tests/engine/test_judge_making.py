"""A judge head, from labelled answers by the commands; what the target holds while it reads them."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import numpy as np
import pytest
from click.testing import Result
from typer.testing import CliRunner

from cloud_service.cli import app
from cloud_service.judging.head_file import read_head
from cloud_service.judging.states import LlamaReader, keep, load_states
from shared.labelled_answers import to_lines
from shared.llama import Extension, LlamaContext, LlamaModel
from shared.messages import Message
from shared.models import file_sha256
from tests.labelled import TEXT, answers
from tests.service import CONTEXT_TOKENS
from tests.tiny_pair import HIDDEN_SIZE, TinyPair

pytestmark = pytest.mark.engine


@pytest.fixture
def context(tiny_pair: TinyPair) -> Iterator[LlamaContext]:
    with (
        closing(LlamaModel(tiny_pair.target_gguf, "target")) as model,
        LlamaContext(
            model,
            num_sequences=1,
            context_tokens=CONTEXT_TOKENS,
            rollback_tokens=0,
            threads=1,
            cache_type="f32",
        ) as context,
    ):
        yield context


def test_what_is_kept_of_an_answer_is_what_the_target_holds_token_by_token(
    context: LlamaContext, tmp_path: Path
) -> None:
    labelled = answers(2)[3].model_copy(update={"answer": 30 * TEXT})  # longer than one pass
    assert keep(LlamaReader(context, 150).read, labelled, tmp_path, "sha")
    [(_, read)] = load_states(tmp_path, "sha", [labelled])
    model = context.model
    token_ids = model.tokenize(labelled.answer)[:150]
    assert read.token_ids.tolist() == token_ids
    assert read.ends[-1] == len(b"".join(map(model.piece, token_ids)))
    context.rewind(0, 0)
    [logits] = context.extend(0, model.render_chat([Message("user", labelled.question)]), 1)
    for i, token in enumerate(token_ids):
        assert read.own_ids[i] == logits.argmax()
        [[logits]] = context.decode([Extension(0, [token], 1, wants_hidden=True)])
        assert np.allclose(read.hidden[i], context.hidden_states(0)[0], atol=5e-3)


def test_hidden_states_change_no_logits(context: LlamaContext) -> None:
    token_ids = context.model.tokenize(TEXT)
    plain = [row.copy() for row in context.extend(0, token_ids, len(token_ids))]
    context.rewind(0, 0)
    [beside] = context.decode([Extension(0, token_ids, len(token_ids), wants_hidden=True)])
    assert np.allclose(plain, beside, atol=1e-5)


def test_more_tokens_than_rows_are_refused_where_hidden_states_are_wanted(context: LlamaContext) -> None:
    token_ids = [65] * (context.max_rows + 1)
    with pytest.raises(ValueError, match="rows"):
        context.decode([Extension(0, token_ids, 1, wants_hidden=True)])
    context.decode([Extension(0, token_ids, 1)])


def judge(command: str, *arguments: object) -> Result:
    return CliRunner().invoke(app, ["judge", command, *map(str, arguments)])


def test_a_head_is_collected_trained_and_measured_by_commands(
    tiny_pair: TinyPair, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "answers.jsonl").write_text(to_lines(answers()), "utf-8")
    common = ("answers.jsonl", "--states", "states", "--model", tiny_pair.target_gguf)
    assert "5 answers read" in judge("collect", *common, "--limit", 5, "--threads", 1).stdout
    assert "43 answers read" in judge("collect", *common, "--threads", 1).stdout  # where it was broken off
    assert judge("train", *common, "--out", "head.safetensors").exit_code == 0
    head = read_head(tmp_path / "head.safetensors")
    assert (head.model_sha256, head.hidden_size) == (file_sha256(tiny_pair.target_gguf), HIDDEN_SIZE)
    measured = judge("eval", *common, "--head", "head.safetensors")
    assert measured.exit_code == 0
    figures = dict(re.findall(r"^(.+?)  +([\d.]+)", measured.stdout, flags=re.M))
    assert float(figures["false accepts"]) < 0.3 < float(figures["recall"])
    assert float(figures["gain"]) > 1.0


@pytest.mark.parametrize(
    ("command", "text", "message"),
    [
        pytest.param("collect", "", "holds no answer", id="an empty file"),
        pytest.param("train", to_lines(answers(1)), "judge collect", id="answers that were not read"),
        pytest.param("collect", None, "cannot read", id="no file"),
    ],
)
def test_what_cannot_be_learnt_from_is_said_in_one_line(
    tiny_pair: TinyPair,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    command: str,
    text: str | None,
    message: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    if text is not None:
        (tmp_path / "answers.jsonl").write_text(text, "utf-8")
    more = ("--out", "head") if command == "train" else ()
    failed = judge(command, "answers.jsonl", "--states", "states", "--model", tiny_pair.target_gguf, *more)
    assert failed.exit_code == 2
    [line] = failed.stderr.splitlines()
    assert message in line


@pytest.mark.parametrize("engine", ["[1]", "dtype: float32", "{"])
def test_options_of_an_engine_that_are_no_object_are_said_in_one_line(
    tiny_pair: TinyPair, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, engine: str
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "answers.jsonl").write_text(to_lines(answers(1)), "utf-8")
    common = ("--states", "states", "--model", tiny_pair.target_hf)
    failed = judge("collect", "answers.jsonl", *common, "--engine", engine)
    assert failed.exit_code == 2
    [line] = failed.stderr.splitlines()
    assert "--engine must be a JSON object" in line
