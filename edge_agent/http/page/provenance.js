// Who wrote what: names, the legend under an answer, and what is said of a single piece.

import { countOrigins } from "./answer.js";
import { element } from "./dom.js";

/** Each origin has a colour and an underline of its own (style.css), a name and an explanation. */
export const ORIGINS = {
  accepted: { name: "edge, accepted", meaning: "drafted on this machine, confirmed by the cloud" },
  correction: { name: "cloud, correction", meaning: "the cloud's word in place of a draft" },
  bonus: { name: "cloud, bonus", meaning: "the cloud's next word after a draft it confirmed" },
  cloud: { name: "cloud", meaning: "written by the cloud alone" },
  local: { name: "edge", meaning: "written on this machine alone" },
};

const SOURCES = {
  lookup: "copied from earlier in the conversation",
  retrieval: "copied from your documents",
};

const STEPS = { ArrowRight: 1, ArrowLeft: -1 };

/** What to say of a piece of text. */
export function describe(segment, text) {
  const { name, meaning } = ORIGINS[segment.origin] ?? { name: segment.origin, meaning: "" };
  const lines = [`“${visible(text)}” ${name}`, meaning];
  if (segment.replaced) lines.push(`The draft said “${visible(segment.replaced)}”.`);
  if (SOURCES[segment.source]) lines.push(SOURCES[segment.source]);
  return lines;
}

function visible(text) {
  return text.replaceAll("\n", "⏎").trim() || "space";
}

/** The legend: one button per origin that occurs; a pressed one leaves only its text bright. */
export function legend(answer, body) {
  const counts = countOrigins(answer);
  const total = [...counts.values()].reduce((sum, count) => sum + count, 0);
  const buttons = Object.keys(ORIGINS).filter((origin) => counts.has(origin)).map((origin) => {
    const { name, meaning } = ORIGINS[origin];
    const count = counts.get(origin);
    const button = element("button", { type: "button", class: "key", "aria-pressed": "false", title: meaning }, [
      element("span", { class: `swatch ${origin}`, "aria-hidden": "true" }, ["Aa"]),
      `${name} `,
      element("span", { class: "count" }, [`${count} (${Math.round((100 * count) / total)}%)`]),
    ]);
    button.addEventListener("click", () => {
      const chosen = button.getAttribute("aria-pressed") === "false";
      for (const other of buttons) other.setAttribute("aria-pressed", String(chosen && other === button));
      if (chosen) body.dataset.only = origin;
      else delete body.dataset.only;
    });
    return button;
  });
  return element("div", { class: "legend", role: "group", "aria-label": "Who wrote what" }, buttons);
}

/**
 * Explain pieces of an answer: on hover, on a tap, and with the arrow keys once the answer has the focus.
 *
 * @param body the answer's text; its pieces are `.piece` elements with `data-index`
 * @param describeIndex lines to say of the piece with an index
 * @param tooltip the element to show them in
 * @param say speaks a line to screen readers
 */
export function explainPieces(body, describeIndex, tooltip, say) {
  let current = null;

  const show = (piece) => {
    current?.classList.remove("current");
    current = piece;
    tooltip.hidden = !piece;
    if (!piece) return [];
    piece.classList.add("current");
    const [title, ...lines] = describeIndex(Number(piece.dataset.index));
    tooltip.replaceChildren(element("strong", {}, [title]), ...lines.filter(Boolean).map((line) => element("span", {}, [line])));
    place(tooltip, piece);
    return [title, ...lines];
  };
  const shows = () => body.closest("[data-provenance='on']") !== null;
  const under = (event) => (shows() ? event.target.closest(".piece") : null);

  body.addEventListener("pointerover", (event) => show(under(event)));
  body.addEventListener("pointerleave", () => show(null));
  body.addEventListener("click", (event) => show(under(event)));
  body.addEventListener("blur", () => show(null));
  body.addEventListener("keydown", (event) => {
    if (event.target !== body || !(event.key in STEPS) || !shows()) return;
    event.preventDefault();
    const pieces = [...body.querySelectorAll(".piece")];
    const from = current?.isConnected ? pieces.indexOf(current) : -1;
    const next = pieces[Math.min(pieces.length - 1, Math.max(0, from + STEPS[event.key]))];
    if (!next) return;
    next.scrollIntoView({ block: "nearest" });
    say(show(next).join(". "));
  });
}

function place(tooltip, piece) {
  const box = piece.getClientRects()[0] ?? piece.getBoundingClientRect();
  const { offsetWidth: width, offsetHeight: height } = tooltip;
  const left = Math.max(8, Math.min(box.left + box.width / 2 - width / 2, innerWidth - width - 8));
  const above = box.top - height - 8;
  tooltip.style.left = `${left}px`;
  tooltip.style.top = `${above > 8 ? above : box.bottom + 8}px`;
}
