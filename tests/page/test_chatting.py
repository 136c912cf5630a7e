"""Asking on the web page: the keys, the turns, the modes, the settings."""

from __future__ import annotations

import re

import pytest
from playwright.async_api import expect

from shared.messages import Message, Open
from shared.sampling import Sampling
from tests.page.conftest import MAX_TOKENS
from tests.service import TargetAlone, eventually

pytestmark = [pytest.mark.engine, pytest.mark.asyncio(loop_scope="session")]

QUESTION = "Tell me a story."


async def test_what_is_typed_is_answered_with_the_targets_own_text(chat, tiny_pair):
    await chat.choose("Speculate")
    events = await chat.ask(QUESTION)
    answer = events[-1]
    alone = TargetAlone(tiny_pair.target_gguf)
    own = alone.complete(
        Open(
            prompt=(Message("user", QUESTION),),
            sampling=Sampling(temperature=0.0),
            seed=0,
            max_tokens=MAX_TOKENS,
        )
    )
    alone.close()
    assert answer["answer"] == alone.shown(own)
    await expect(chat.page.get_by_role("article", name="Question")).to_have_text(re.compile(QUESTION))
    await expect(chat.answer.locator(".summary")).to_contain_text(f"speculate · {MAX_TOKENS} tokens")


async def test_shift_and_enter_starts_a_line_and_the_button_sends(chat):
    await chat.choose("Local")
    await chat.question.type("one")
    await chat.question.press("Shift+Enter")
    await chat.question.type("two")
    await expect(chat.answers).to_have_count(0)
    async with chat.page.expect_request("**/api/chat") as asked:
        await chat.send.click()
    assert (await asked.value).post_data_json["messages"] == [{"role": "user", "content": "one\ntwo"}]
    await expect(chat.answer.locator(".summary")).to_be_visible()


async def test_blank_questions_are_not_sent(chat):
    await chat.begin("  \n ")
    await expect(chat.answers).to_have_count(0)


async def test_many_turns_are_one_conversation(chat):
    await chat.choose("Local")
    first = (await chat.ask("First?"))[-1]["answer"]
    async with chat.page.expect_request("**/api/chat") as asked:
        await chat.begin("Second?")
    assert (await asked.value).post_data_json["messages"] == [
        {"role": "user", "content": "First?"},
        {"role": "assistant", "content": first},
        {"role": "user", "content": "Second?"},
    ]
    await expect(chat.answers).to_have_count(2)
    await expect(chat.send).to_be_visible()
    await chat.page.get_by_role("button", name="New chat").click()
    await expect(chat.answers).to_have_count(0)
    async with chat.page.expect_request("**/api/chat") as asked:
        await chat.begin("Third?")
    assert len((await asked.value).post_data_json["messages"]) == 1


async def test_the_last_answer_can_be_tried_again(chat):
    await chat.choose("Local")
    await chat.ask(QUESTION)
    async with chat.page.expect_request("**/api/chat") as asked:
        await chat.answer.get_by_role("button", name="Try again").click()
    assert len((await asked.value).post_data_json["messages"]) == 1
    await expect(chat.answer.locator(".summary")).to_be_visible()
    await expect(chat.answers).to_have_count(1)


@pytest.mark.parametrize(
    ("mode", "origins"),
    [
        pytest.param("Local", {"local"}, id="local: the edge alone"),
        pytest.param("Cloud", {"cloud"}, id="cloud: the target alone"),
        pytest.param("Speculate", {"accepted", "correction", "bonus"}, id="speculate: both"),
    ],
)
async def test_the_mode_switch_says_who_answers(chat, mode, origins):
    await chat.choose(mode)
    events = await chat.ask(QUESTION)
    assert events[-1]["mode"] == mode.lower()
    shown = await chat.body.locator(".piece").evaluate_all(
        "pieces => pieces.map((piece) => piece.classList[1])"
    )
    assert set(shown) == origins


async def test_the_mode_switch_obeys_the_arrow_keys_and_is_remembered(chat):
    await chat.mode("Auto").focus()
    await chat.page.keyboard.press("ArrowRight")
    await expect(chat.mode("Local")).to_be_checked()
    await chat.page.reload()
    await expect(chat.mode("Local")).to_be_checked()


@pytest.mark.parametrize("how", ["button", "Escape"])
async def test_an_answer_can_be_stopped_and_frees_its_place_in_the_cloud(chat, slow_cloud, how):
    await chat.choose("Speculate")
    await chat.begin(QUESTION)
    await expect(chat.body.locator(".piece").first).to_be_visible()
    if how == "button":
        await chat.stop.click()
    else:
        await chat.page.keyboard.press("Escape")
    await expect(chat.answer).to_contain_text("Stopped. What was confirmed stands.")
    await expect(chat.body.locator(".provisional")).to_have_count(0)
    assert 0 < await chat.body.locator(".piece").count() < MAX_TOKENS
    await eventually(lambda: slow_cloud.is_idle)
    await expect(chat.send).to_be_visible()


async def test_settings_go_with_the_question_and_are_remembered(chat):
    await chat.choose("Local")
    await (await chat.setting("System prompt")).fill("Be brief.")
    await chat.page.get_by_label("Longest answer, tokens").fill("5")
    await chat.page.get_by_label("Temperature").fill("0.5")
    await chat.save_settings()
    await chat.page.reload()
    async with chat.page.expect_request("**/api/chat") as asked:
        await chat.begin(QUESTION)
    sent = (await asked.value).post_data_json
    assert sent["messages"][0] == {"role": "system", "content": "Be brief."}
    assert sent["settings"] == {"mode": "local", "max_tokens": 5, "temperature": 0.5}
    await expect(chat.answer.locator(".summary")).to_contain_text("5 tokens")


async def test_a_setting_that_the_server_refuses_is_explained(chat):
    await chat.page.evaluate(
        "localStorage['duet.settings'] = JSON.stringify({ mode: 'local', max_tokens: -1 })"
    )
    await chat.page.reload()
    await chat.begin(QUESTION)
    await expect(chat.page.get_by_role("alert")).to_contain_text("max_tokens")
    chat.complaints.clear()  # the browser itself reports the refusal
