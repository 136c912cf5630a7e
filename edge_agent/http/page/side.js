// Where the details of the chosen answer stand: beside the chat, or on a narrow screen under the answer.

import { details } from "./details.js";
import { element } from "./dom.js";

const WIDE = matchMedia("(min-width: 68rem)");
const EVERY_MS = 200;

export class Side {
  constructor(aside) {
    this.aside = aside;
    this.panel = element("section", { class: "details", id: "details", "aria-label": "Details" });
    this.empty = element("p", { class: "note" }, ["Here you will see who the router chose and why, how many drafts were accepted, and how fast the answer came."]);
    this.view = null;
    this.expanded = false;
    this.drawnAt = 0;
    aside.append(this.empty, this.panel);
    WIDE.addEventListener("change", () => this.place());
  }

  /** Show an answer that has just begun. */
  follow(view) {
    this.choose(view);
    this.update(performance.now(), true);
  }

  /** The button of an answer: on a narrow screen it also closes. */
  toggle(view) {
    const open = view === this.view && this.expanded;
    this.choose(view);
    this.expanded = WIDE.matches || !open;
    this.update(performance.now(), true);
    this.place();
    if (this.expanded && !WIDE.matches) this.panel.scrollIntoView({ block: "nearest" });
  }

  choose(view) {
    this.view?.detailsButton.setAttribute("aria-expanded", "false");
    this.view = view;
    this.empty.hidden = view !== null;
    this.expanded = WIDE.matches;
    this.place();
  }

  place() {
    const shown = this.view && (WIDE.matches || this.expanded);
    (WIDE.matches || !this.view ? this.aside : this.view.root).append(this.panel);
    this.panel.hidden = !shown;
    this.view?.detailsButton.setAttribute("aria-expanded", String(Boolean(shown)));
  }

  /** Draw anew, not more often than eyes want. */
  update(now, atOnce = false) {
    if (!this.view || (!atOnce && now - this.drawnAt < EVERY_MS)) return;
    this.drawnAt = now;
    const open = new Set([...this.panel.querySelectorAll("details[open]")].map((node) => node.dataset.keep));
    this.panel.replaceChildren(...details(this.view.answer, now));
    for (const node of this.panel.querySelectorAll("details")) node.open = open.has(node.dataset.keep);
  }
}
