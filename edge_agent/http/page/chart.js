// The live chart: how many draft tokens each round accepted, and how fast the answer grows.

import { countRounds, speeds } from "./answer.js";
import { svg, element } from "./dom.js";

const WIDTH = 300;
const MAX_ROUNDS = 50;
const ROUNDS = { top: 6, height: 56 };
const SPEED = { top: 8, height: 60, left: 26 };

/** The two pictures of an answer as far as it has come; an empty list where there is nothing to draw. */
export function charts(answer, now) {
  return [roundsChart(answer), speedChart(answer, now)].filter(Boolean);
}

function roundsChart(answer) {
  const drafting = answer.rounds.filter((round) => round.drafted > 0);
  if (!drafting.length) return null;
  const { drafted, accepted } = countRounds(answer);
  const shown = drafting.slice(-MAX_ROUNDS);
  const most = Math.max(...shown.map((round) => round.drafted));
  const step = WIDTH / Math.max(shown.length, 24);
  const unit = ROUNDS.height / most;
  const bars = shown.flatMap((round, index) => {
    const bar = (from, to, name) => {
      const y = ROUNDS.top + ROUNDS.height - to * unit;
      return svg("rect", { class: name, x: index * step + 1, y: y + 0.75, width: step - 2, height: (to - from) * unit - 1.5, rx: 1 });
    };
    return [
      ...(round.accepted ? [bar(0, round.accepted, "taken")] : []),
      ...(round.accepted < round.drafted ? [bar(round.accepted, round.drafted, "drafted")] : []),
    ];
  });
  const share = Math.round((100 * accepted) / drafted);
  const skipped = drafting.length - shown.length;
  return picture(
    `Drafts accepted: ${share}%`,
    `${accepted} of ${drafted} draft tokens in ${drafting.length} ${drafting.length === 1 ? "round" : "rounds"}${skipped ? `; the last ${shown.length} shown` : ""}`,
    ROUNDS.top + ROUNDS.height + 1,
    [line(0, ROUNDS.top + ROUNDS.height + 0.5, WIDTH), ...bars],
    [swatch("taken", "accepted"), swatch("drafted", "drafted, not accepted")],
  );
}

function speedChart(answer, now) {
  const points = speeds(answer, now);
  if (points.length < 2) return null;
  const most = ceiling(Math.max(...points.map((point) => point.perSecond)));
  const until = points[points.length - 1].s;
  const bottom = SPEED.top + SPEED.height;
  const x = (s) => SPEED.left + ((WIDTH - SPEED.left - 2) * s) / until;
  const y = (perSecond) => bottom - (SPEED.height * perSecond) / most;
  const path = points.map(({ s, perSecond }, index) => `${index ? "L" : "M"}${x(s).toFixed(1)} ${y(perSecond).toFixed(1)}`).join("");
  const area = `${path}L${x(until).toFixed(1)} ${bottom}L${x(points[0].s).toFixed(1)} ${bottom}Z`;
  const { perSecond } = points[points.length - 1];
  const overall = answer.result?.tpot_ms ? 1000 / answer.result.tpot_ms : null;
  const speed = overall ?? perSecond;
  const grid = [0, most / 2, most].flatMap((value) => [
    line(SPEED.left, y(value), WIDTH),
    label(SPEED.left - 5, y(value) + 3.5, "end", String(value)),
  ]);
  return picture(
    `Speed: ${speed.toFixed(speed < 10 ? 1 : 0)} tokens/s`,
    overall === null ? `over the last 2 s, ${until.toFixed(0)} s so far` : `over all; the line is over 2 s each`,
    bottom + 16,
    [
      ...grid,
      svg("path", { class: "area", d: area }),
      svg("path", { class: "line", d: path }),
      label(SPEED.left, bottom + 13, "start", "0"),
      label(WIDTH, bottom + 13, "end", `${until.toFixed(until < 10 ? 1 : 0)} s`),
    ],
  );
}

function picture(title, note, height, marks, keys = []) {
  const image = svg("svg", { viewBox: `0 0 ${WIDTH} ${height}`, role: "img", "aria-label": `${title}; ${note}` }, marks);
  return element("figure", { class: "chart" }, [
    element("figcaption", {}, [element("b", {}, [title]), element("span", {}, [note])]),
    image,
    ...(keys.length ? [element("div", { class: "keys-of-chart", "aria-hidden": "true" }, keys)] : []),
  ]);
}

function swatch(name, text) {
  const box = svg("svg", { viewBox: "0 0 10 10", width: 10, height: 10 }, [svg("rect", { class: name, x: 1, y: 1, width: 8, height: 8, rx: 1.5 })]);
  return element("span", {}, [box, text]);
}

function line(x1, y, x2) {
  return svg("line", { class: "grid", x1, x2, y1: y, y2: y });
}

function label(x, y, anchor, text) {
  return svg("text", { x, y, "text-anchor": anchor }, [text]);
}

/** The next of 2, 4, 10, 20, 40, 100, ... */
function ceiling(value) {
  const power = 10 ** Math.floor(Math.log10(Math.max(value, 1)));
  return [2, 4, 10].map((step) => step * power).find((candidate) => candidate >= value);
}
