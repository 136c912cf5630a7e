// The side panel: how one answer was made. The router's view, the live chart, the figures.

import { countRounds } from "./answer.js";
import { charts } from "./chart.js";
import { element } from "./dom.js";

const ROUTES = {
  local: "the small model alone",
  speculate: "drafts by the small model, verified by the large one",
  guide: "begun by the large model, finished by the small one",
  cloud: "the large model alone",
};

/** Elements that describe an answer as far as it has come. */
export function details(answer, now) {
  return [
    element("h2", {}, ["How it was made"]),
    madeBy(answer),
    ...routing(answer),
    ...charts(answer, now),
    ...figures(answer),
  ];
}

function madeBy({ mode, isOver }) {
  const undecided = isOver ? "It ended before anybody was chosen." : "The router decides…";
  return element("p", { class: "made-by" }, ROUTES[mode] ? [element("b", {}, [mode]), `: ${ROUTES[mode]}`] : [undecided]);
}

function routing({ decision, result }) {
  if (!decision) return [];
  const { p_cloud: needed, predicted_tokens: length, reasons = [], probes = {} } = decision;
  const written = result ? `, ${result.completion_tokens} written` : "";
  const read = Object.entries(probes).filter(([, reading]) => reading && typeof reading === "object");
  return [
    element("section", { class: "routing", "aria-label": "The router" }, [
      meter("The cloud is needed", needed),
      element("p", { class: "note" }, [`Expected length ${length} tokens${written}`]),
      element("ul", { class: "reasons" }, reasons.map((reason) => element("li", {}, [reason]))),
      ...(read.length ? [element("details", { class: "probes", "data-keep": "probes" }, [
        element("summary", {}, ["What the small model said of the question"]),
        ...read.map(([name, reading]) => probe(name, reading)),
      ])] : []),
    ]),
  ];
}

function probe(name, { value, distribution, text }) {
  const understood = typeof value === "number";
  const children = [element("h3", {}, [name, element("span", {}, [understood ? decimals(value) : "not understood"])])];
  if (distribution) children.push(...Object.entries(distribution).map(([option, probability]) => meter(option, probability)));
  else if (text) children.push(element("p", { class: "note" }, [`“${text.trim().split("\n")[0]}”`]));
  return element("div", { class: "probe" }, children);
}

function meter(name, probability) {
  const percent = `${Math.round(100 * probability)}%`;
  const bar = element("span", { class: "fill" });
  bar.style.inlineSize = percent;
  return element("div", { class: "meter" }, [
    element("span", { class: "name" }, [name]),
    element("span", { class: "track", "aria-hidden": "true" }, [bar]),
    element("span", { class: "value" }, [percent]),
  ]);
}

function figures(answer) {
  const { result } = answer;
  if (!result) return [];
  const speculated = result.rounds > 0;
  const rows = [
    ["first text shown", answer.firstShownAt && milliseconds(answer.firstShownAt - answer.startedAt)],
    ["first token confirmed", milliseconds(result.ttft_ms)],
    ["time per token", milliseconds(result.tpot_ms)],
    ["tokens", `${result.completion_tokens} (prompt ${result.prompt_tokens})`],
    ["rounds", speculated && result.rounds],
    ["tokens per round", speculated && decimals(result.acceptance_length)],
    ["passes of the large model", result.mode === "local" ? 0 : result.target_passes],
    ["bytes per token on the wire", result.bytes_per_token && decimals(result.bytes_per_token)],
    ["ended by", { stop: "the model's own end", length: "the length limit" }[result.finish_reason] ?? result.finish_reason],
    ["edge model", result.edge_model],
    ["cloud model", result.cloud_model],
  ].filter(([, value]) => value !== null && value !== undefined && value !== false);
  const list = rows.map(([name, value]) => element("div", {}, [element("dt", {}, [name]), element("dd", {}, [String(value)])]));
  return [element("dl", { class: "figures" }, list)];
}

/** One line under an answer. */
export function summary(answer) {
  const { result } = answer;
  if (!result) return "";
  const { drafted, accepted } = countRounds(answer);
  return [
    result.mode,
    `${result.completion_tokens} tokens`,
    result.tpot_ms ? `${decimals(1000 / result.tpot_ms)} tokens/s` : null,
    drafted ? `${Math.round((100 * accepted) / drafted)}% of drafts accepted` : null,
  ].filter(Boolean).join(" · ");
}

function milliseconds(value) {
  return value === null || value === undefined ? null : value < 10000 ? `${Math.round(value)} ms` : `${(value / 1000).toFixed(1)} s`;
}

function decimals(value) {
  return value >= 100 ? value.toFixed(0) : value.toFixed(value >= 10 ? 1 : 2);
}
