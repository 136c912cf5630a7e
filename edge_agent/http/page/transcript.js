// The turns on the page: questions, and answers that grow.

import { DONE, FAILED, STOPPED } from "./answer.js";
import { summary } from "./details.js";
import { element } from "./dom.js";
import { describe, explainPieces, legend } from "./provenance.js";
import { Renderer } from "./render.js";

/** What somebody asked. */
export function questionTurn(text) {
  return element("article", { class: "turn question", "aria-label": "Question" }, [
    element("h2", { class: "sr-only" }, ["You asked"]),
    element("p", {}, [text]),
  ]);
}

/** One answer on the page. `actions` are called with the view: {retry, details}. */
export class AnswerView {
  constructor(answer, actions, tooltip, say) {
    this.answer = answer;
    this.actions = actions;
    this.notices = element("div", { class: "notices" });
    this.body = element("div", { class: "body", tabindex: "0", role: "group", "aria-label": "Answer; the arrow keys tell who wrote each piece" });
    this.waiting = element("p", { class: "waiting" });
    this.thoughts = element("p", {});
    this.thinking = element("details", { class: "thoughts", hidden: true }, [element("summary", {}, ["Thoughts"]), this.thoughts]);
    this.footer = element("footer", { hidden: true });
    this.detailsButton = element("button", { type: "button", class: "quiet", "aria-expanded": "false", "data-action": "details" }, ["Details"]);
    this.detailsButton.addEventListener("click", () => actions.details(this));
    const heading = element("h2", { class: "sr-only" }, ["Answer"]);
    this.root = element("article", { class: "turn answer", "aria-label": "Answer" }, [heading, this.notices, this.thinking, this.body, this.waiting, this.footer]);
    this.renderer = new Renderer(this.body);
    explainPieces(this.body, (index) => {
      const segment = answer.segments[index];
      return describe(segment, answer.text.slice(segment.start, segment.end));
    }, tooltip, say);
  }

  update(now) {
    const { answer } = this;
    this.renderer.update(answer, now);
    this.body.hidden = !this.body.hasChildNodes();
    this.thinking.hidden = !answer.thoughts;
    this.thoughts.textContent = answer.thoughts;
    this.waiting.hidden = answer.isOver || !this.body.hidden;
    this.waiting.textContent = waitingFor(answer);
    for (const message of answer.notices.slice(this.notices.childElementCount)) {
      this.notices.append(element("p", { class: "notice" }, [asSentence(message)]));
    }
    if (answer.isOver && this.footer.hidden) this.finish();
  }

  finish() {
    const { answer } = this;
    const remarks = { [STOPPED]: "Stopped. What was confirmed stands.", [FAILED]: asSentence(answer.error ?? ""), [DONE]: summary(answer) };
    const said = element("p", answer.state === FAILED ? { class: "failure", role: "alert" } : { class: "summary" }, [remarks[answer.state]]);
    const copy = element("button", { type: "button", class: "quiet", "data-copy": "answer" }, ["Copy"]);
    const retry = element("button", { type: "button", class: "quiet", "data-action": "retry" }, ["Try again"]);
    retry.addEventListener("click", () => this.actions.retry(this));
    const buttons = element("div", { class: "turn-actions" }, [...(answer.text ? [copy] : []), retry, this.detailsButton]);
    this.footer.append(...(answer.segments.length ? [legend(answer, this.body)] : []), said, buttons);
    this.footer.hidden = false;
  }

  /** Only the last answer can be tried again. */
  settle() {
    this.footer.querySelector("[data-action='retry']")?.remove();
  }
}

function waitingFor(answer) {
  const { position, decision, mode } = answer;
  if (position) return position === 1 ? "Waiting: this question is next" : `Waiting: ${position - 1} before this question`;
  if (answer.isThinking) return "Thinking";
  if (mode === "auto" && !decision) return "The small model is reading the question";
  return "Reading";
}

/** The server's lines begin in lower case, as a terminal shows them after the command's name; so do names in them. */
function asSentence(line) {
  return line.replace(/^[a-z](?=[a-z]*[ ,])(?!\S+ =)/, (letter) => letter.toUpperCase());
}

/** Copy buttons of answers and code blocks. */
export function enableCopying(transcript, textOf, status) {
  transcript.addEventListener("click", async (event) => {
    const button = event.target.closest("[data-copy]");
    if (!button) return;
    const text = button.dataset.copy === "code"
      ? button.closest(".code").querySelector("code").textContent
      : textOf(button.closest(".answer"));
    const copied = await copy(text);
    button.textContent = copied ? "Copied" : "Not allowed";
    status(copied ? "Copied" : "The browser does not allow copying here");
    setTimeout(() => { button.textContent = "Copy"; }, 1600);
  });
}

async function copy(text) {
  try {
    await navigator.clipboard.writeText(text);
    return true;
  } catch {
    return false; // no permission, or a page that did not come over https or from this machine
  }
}
