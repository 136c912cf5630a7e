// What screen readers hear: whole sentences of an answer once they are confirmed, never single tokens or drafts.

import { DONE, STOPPED } from "./answer.js";
import { element } from "./dom.js";

const SENTENCE = /[\s\S]*?(?:[.!?…:](?=\s)|\n)/y;
const KEPT = 6;
/** A failure is an alert, which speaks for itself. */
const ENDS = { [DONE]: "The answer is complete", [STOPPED]: "Stopped" };

export class Announcer {
  /**
   * @param spoken an `aria-live` region that speaks what is added
   * @param status a `role="status"` region for short remarks, which replace each other
   */
  constructor(spoken, status) {
    this.spoken = spoken;
    this.status = status;
    this.said = 0;
    this.isOver = true;
  }

  remark(text) {
    this.status.textContent = text;
  }

  begin() {
    this.said = 0;
    this.isOver = false;
    this.spoken.replaceChildren();
    this.remark("Answering");
  }

  /** Speak the sentences of the confirmed text that are new and whole; at the end what is left, and that it ended. */
  follow({ text, isOver, state }) {
    if (this.isOver) return;
    this.isOver = isOver;
    this.speak(text.slice(this.said, isOver ? text.length : this.endOfSentences(text)));
    if (isOver && ENDS[state]) this.remark(ENDS[state]);
  }

  endOfSentences(text) {
    let end = this.said;
    for (;;) {
      SENTENCE.lastIndex = end;
      const found = SENTENCE.exec(text);
      if (!found) return end;
      end += found[0].length;
    }
  }

  speak(text) {
    this.said += text.length;
    const words = text.replace(/[*_`#>|]+/g, " ").trim();
    if (!words) return;
    this.spoken.append(element("p", {}, [words]));
    while (this.spoken.childElementCount > KEPT) this.spoken.firstElementChild.remove();
  }
}
