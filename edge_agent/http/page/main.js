// The page: puts its parts together.

import { Announcer } from "./announcer.js";
import { Chat } from "./chat.js";
import { composer } from "./composer.js";
import { element } from "./dom.js";
import { Latest } from "./latest.js";
import { MODES, modeSwitch } from "./modes.js";
import { Settings, settingsDialog } from "./settings.js";
import { Side } from "./side.js";
import { modes, RequestFailed } from "./stream.js";
import { themeButton } from "./theme.js";
import { AnswerView, enableCopying, questionTurn } from "./transcript.js";

const EXAMPLES = [
  "Name the three primary colours of light.",
  "Write a Python function that returns the n-th Fibonacci number.",
  "Why is the sky blue? Answer in three sentences.",
];
const UNAUTHORIZED = 401;
const CHART_EVERY_MS = 250;

const byId = (id) => document.getElementById(id);
const settings = new Settings();
const chat = new Chat(settings);
const side = new Side(byId("side"));
const announcer = new Announcer(byId("spoken"), byId("status"));
const transcript = byId("transcript");
const views = [];
const latest = new Latest(byId("to-latest"));
let isGreeted = false;

const input = composer(byId("composer"), { send, stop: () => chat.stop() });
const dialog = settingsDialog(byId("settings"), settings, () => {
  showProvenance();
  if (!isGreeted) greet();
});
themeButton(byId("theme"), settings);
byId("open-settings").addEventListener("click", () => dialog.open());
byId("new-chat").addEventListener("click", clear);
enableCopying(transcript, (article) => views.find((view) => view.root === article).answer.text, (text) => announcer.remark(text));
showExamples();
showProvenance();
greet();

/** Ask the server for its modes; until it answers, all are offered. */
async function greet() {
  try {
    offer(await modes(settings.apiKey));
    isGreeted = true;
  } catch (error) {
    if (!(error instanceof RequestFailed)) throw error;
    offer(Object.keys(MODES));
    if (error.status === UNAUTHORIZED) dialog.open({ askForKey: true });
  }
}

function offer(available) {
  const chosen = available.includes(settings.get("mode")) ? settings.get("mode") : available[0];
  settings.set({ mode: chosen });
  modeSwitch(byId("modes"), available, chosen, (mode) => settings.set({ mode }));
}

/** Answers name the models that made them. */
function showModels({ result }) {
  const models = [result?.edge_model, result?.cloud_model].filter(Boolean);
  if (!models.length) return;
  byId("models").textContent = models.join(" + ");
  byId("models").hidden = false;
}

function send(text) {
  byId("welcome").hidden = true;
  views.at(-1)?.settle();
  chat.say(text);
  transcript.append(questionTurn(text));
  answerLast();
}

function retry(view) {
  if (chat.isAnswering) return;
  chat.forgetAnswer();
  views.splice(views.indexOf(view), 1);
  view.root.remove();
  answerLast();
}

async function answerLast() {
  const answer = chat.begin(settings.get("mode"));
  const view = new AnswerView(answer, { retry, details: (chosen) => side.toggle(chosen) }, byId("tooltip"), (text) => announcer.remark(text));
  views.push(view);
  transcript.append(view.root);
  side.follow(view);
  announcer.begin();
  input.answering(true);
  const draw = drawing(view);
  draw();
  latest.jump();
  const ticking = setInterval(draw, CHART_EVERY_MS);
  const failure = await chat.answer(answer, draw);
  clearInterval(ticking);
  input.answering(chat.isAnswering);
  showModels(answer);
  if (failure?.status === UNAUTHORIZED) dialog.open({ askForKey: true });
}

/** Draws at most once a frame. */
function drawing(view) {
  let frame = null;
  return () => {
    frame ??= requestAnimationFrame(() => {
      frame = null;
      const now = performance.now();
      view.update(now);
      if (side.view === view) side.update(now, view.answer.isOver);
      announcer.follow(view.answer);
      latest.follow();
    });
  };
}

function clear() {
  chat.clear();
  views.length = 0;
  side.choose(null);
  for (const turn of transcript.querySelectorAll(".turn")) turn.remove();
  byId("welcome").hidden = false;
  announcer.remark("New chat");
  input.focus();
}

function showProvenance() {
  transcript.dataset.provenance = settings.get("provenance") ? "on" : "off";
}

function showExamples() {
  byId("examples").append(...EXAMPLES.map((text) => {
    const button = element("button", { type: "button" }, [text]);
    button.addEventListener("click", () => send(text));
    return element("li", {}, [button]);
  }));
}
