// One answer as its events arrive: plain data, no DOM, no clock (times are given, in milliseconds).

export const WAITING = "waiting";
export const WRITING = "writing";
export const DONE = "done";
export const STOPPED = "stopped";
export const FAILED = "failed";

export class Answer {
  constructor(mode, now) {
    this.mode = mode;
    this.startedAt = now;
    this.state = WAITING;
    /** Committed text, and its pieces in order: {start, end, origin, source, replaced, at}. */
    this.text = "";
    this.segments = [];
    /** What a reasoning model thinks before it answers. */
    this.thoughts = "";
    this.isThinking = false;
    /** Drafted text that is not verified yet; it follows `text`, or `thoughts` while it thinks. */
    this.provisional = "";
    /** {drafted, accepted, at}, one per verification. */
    this.rounds = [];
    this.notices = [];
    this.decision = null;
    this.position = null;
    /** The figures of the whole answer, once there is one. */
    this.result = null;
    this.error = null;
    this.firstShownAt = null;
  }

  get isOver() {
    return [DONE, STOPPED, FAILED].includes(this.state);
  }

  /** Take one event of the stream; unknown ones are of a newer server and are left alone. */
  apply(event, now) {
    const take = TAKE[event.type];
    if (take) take(this, event, now);
  }

  /** What was confirmed stands; what was not is gone. */
  end(state, error = null) {
    this.state = state;
    this.error = error;
    this.provisional = "";
  }

  shown(now) {
    this.state = WRITING;
    this.firstShownAt ??= now;
  }
}

const TAKE = {
  waiting(answer, { position }) {
    answer.position = position;
  },

  route(answer, { type, mode, ...decision }) {
    answer.mode = mode;
    answer.position = null;
    // Only the router has an opinion; without it there is a mode and nothing else.
    if (decision.reasons) answer.decision = decision;
  },

  notice(answer, { message }) {
    answer.notices.push(message);
  },

  round(answer, { drafted, accepted }, now) {
    answer.rounds.push({ drafted, accepted, at: now });
  },

  text(answer, { text, origin, thinking }, now) {
    if (!text) return;
    answer.shown(now);
    answer.isThinking = thinking;
    if (thinking) {
      answer.thoughts += text;
      answer.provisional = "";
      return;
    }
    const start = answer.text.length;
    // A correction stands where the draft said something else.
    const differs = !answer.provisional.startsWith(text);
    const replaced = origin === "correction" && differs ? firstWord(answer.provisional) : null;
    answer.text += text;
    answer.segments.push({ start, end: answer.text.length, origin, source: null, replaced, at: now });
    answer.provisional = differs ? "" : answer.provisional.slice(text.length);
  },

  provisional(answer, { text }, now) {
    if (text) answer.shown(now);
    answer.provisional = text;
  },

  answer(answer, { type, ...result }) {
    answer.result = result;
    answer.mode = result.mode;
    answer.end(DONE);
    describeSources(answer);
  },

  error(answer, { error }) {
    answer.end(FAILED, error.message);
  },
};

/** The beginning of a rejected draft, up to the end of its first word. */
function firstWord(text) {
  return /^\s*\S*/.exec(text)[0] || null;
}

/** Only the whole answer says who proposed each token. */
function describeSources(answer) {
  const tokens = answer.result.tokens ?? [];
  let at = 0;
  const sources = new Map();
  for (const { text, source } of tokens) {
    if (!answer.text.startsWith(text, at)) return; // a character of several tokens, or a stop text that was cut off
    if (source) sources.set(at, source);
    at += text.length;
  }
  for (const segment of answer.segments) segment.source = sources.get(segment.start) ?? segment.source;
}

/** Tokens of an answer by origin, in the order of first appearance. */
export function countOrigins(answer) {
  const counts = new Map();
  for (const { origin } of answer.result?.tokens ?? answer.segments) {
    counts.set(origin, (counts.get(origin) ?? 0) + 1);
  }
  return counts;
}

/** Draft tokens of all rounds so far. */
export function countRounds({ rounds }) {
  const total = (name) => rounds.reduce((sum, round) => sum + round[name], 0);
  return { drafted: total("drafted"), accepted: total("accepted") };
}

/** Confirmed pieces per second within the last `window` milliseconds before each step, for the chart. */
export function speeds(answer, now, { window = 2000, step = 250 } = {}) {
  const { segments } = answer;
  if (segments.length < 2) return [];
  const first = segments[0].at;
  const last = answer.isOver ? segments[segments.length - 1].at : now;
  const found = [];
  let [left, right] = [0, 0];
  for (let at = first + step; at < last + step; at += step) {
    while (right < segments.length && segments[right].at <= at) right += 1;
    while (segments[left].at <= at - window && left < right - 1) left += 1;
    // The first round's tokens come at once: not a speed yet.
    const covered = Math.max(1000, Math.min(window, at - first));
    found.push({ s: (at - first) / 1000, perSecond: (1000 * (right - left)) / covered });
  }
  return found;
}
