// Markdown as chat models write it: text in, a tree of plain objects out. Builds no HTML.
//
// Every leaf knows where it stands in the source, so that who wrote it can be looked up afterwards:
//   block: {type, start, end, ...}, where start and end are offsets into the source
//   leaf:  {type: "text", text, start}, one contiguous piece of the source
// Raw HTML is text like any other. A fence that is not closed reaches to the end; so do bold text and code in the
// last line of a text that is still being written.

const FENCE = /^ {0,3}(`{3,}|~{3,})\s*([^\s`]*)[^`]*$/;
const HEADING = /^ {0,3}(#{1,6})[ \t]+(.*?)[ \t]*#*[ \t]*$/;
const RULE = /^ {0,3}([-*_])(?:[ \t]*\1){2,}[ \t]*$/;
const QUOTE = /^ {0,3}> ?/;
const ITEM = /^( *)([-*+]|\d{1,9}[.)])[ \t]+/;
const TABLE_RULE = /^ {0,3}\|?[ \t]*:?-+:?[ \t]*(?:\|[ \t]*:?-+:?[ \t]*)*\|?[ \t]*$/;
const SAFE_LINK = /^(?:https?:\/\/|mailto:)/i;
const MAX_DEPTH = 12;

/**
 * Parse a text into blocks.
 *
 * @param isOpen whether more text will follow
 */
export function parse(source, isOpen = false) {
  const lines = [];
  let start = 0;
  for (const text of source.split("\n")) {
    lines.push({ text, start });
    start += text.length + 1;
  }
  const blocks = parseBlocks(lines, { depth: 0, isOpen });
  nestHeadings(blocks);
  return blocks;
}

/** Give headings a `depth` from 1 that never skips a level, whatever levels the model chose. */
function nestHeadings(blocks) {
  const open = [];
  for (const block of blocks.filter(({ type }) => type === "heading")) {
    while (open.length && open.at(-1) >= block.level) open.pop();
    open.push(block.level);
    block.depth = open.length;
  }
}

function parseBlocks(lines, { depth, isOpen }) {
  const blocks = [];
  let at = 0;
  while (at < lines.length) {
    if (isBlank(lines[at])) {
      at += 1;
      continue;
    }
    const read = firstRead(lines, at, { depth, isOpen });
    const last = lines[read.next - 1];
    blocks.push({ ...read.block, start: lines[at].start, end: last.start + last.text.length });
    at = read.next;
  }
  return blocks;
}

function firstRead(lines, at, place) {
  for (const reader of READERS) {
    const read = reader(lines, at, place);
    if (read) return read;
  }
  return null; // never: anything is a paragraph
}

/** Each gives {block, next}, `next` being the first line after it, or null where its block does not begin. */
const READERS = [readFence, readHeading, readRule, readQuote, readList, readTable, readParagraph];

function readFence(lines, at) {
  const open = FENCE.exec(lines[at].text);
  if (!open) return null;
  const close = new RegExp(`^ {0,3}${open[1][0]}{${open[1].length},}[ \\t]*$`);
  let end = at + 1;
  while (end < lines.length && !close.test(lines[end].text)) end += 1;
  const children = [];
  lines.slice(at + 1, end).forEach((line, index, body) => {
    const text = index < body.length - 1 ? `${line.text}\n` : line.text;
    if (text) children.push({ type: "text", text, start: line.start });
  });
  const closed = end < lines.length;
  return { block: { type: "code", language: open[2], closed, children }, next: closed ? end + 1 : end };
}

function readHeading(lines, at) {
  const found = HEADING.exec(lines[at].text);
  if (!found) return null;
  const skipped = lines[at].text.indexOf(found[2], found[1].length);
  const children = parseInline([{ text: found[2], start: lines[at].start + skipped }]);
  return { block: { type: "heading", level: found[1].length, depth: 1, children }, next: at + 1 };
}

function readRule(lines, at) {
  return RULE.test(lines[at].text) ? { block: { type: "rule" }, next: at + 1 } : null;
}

function readQuote(lines, at, { depth, isOpen }) {
  if (depth >= MAX_DEPTH || !QUOTE.test(lines[at].text)) return null;
  const inner = [];
  let next = at;
  while (next < lines.length && QUOTE.test(lines[next].text)) {
    inner.push(without(lines[next], QUOTE.exec(lines[next].text)[0].length));
    next += 1;
  }
  return { block: { type: "quote", children: parseBlocks(inner, { depth: depth + 1, isOpen: isOpen && next === lines.length }) }, next };
}

function readList(lines, at, { depth, isOpen }) {
  const first = ITEM.exec(lines[at].text);
  if (depth >= MAX_DEPTH || !first) return null;
  const ordered = /\d/.test(first[2]);
  const items = [];
  let next = at;
  while (next < lines.length) {
    const marker = ITEM.exec(lines[next].text);
    if (!marker || marker[1].length > first[1].length + 3 || /\d/.test(marker[2]) !== ordered) break;
    if (RULE.test(lines[next].text) || marker[1].length < first[1].length) break;
    // What a line needs as indentation to belong to the item: at least two, whatever the marker's width.
    const indent = marker[1].length + 2;
    const inner = [without(lines[next], marker[0].length)];
    next += 1;
    while (next < lines.length && belongs(lines, next, indent)) {
      inner.push(without(lines[next], Math.min(indentation(lines[next]), marker[0].length)));
      next += 1;
    }
    items.push(parseBlocks(inner, { depth: depth + 1, isOpen: isOpen && next === lines.length }));
    const after = afterBlanks(lines, next);
    if (after < lines.length && ITEM.test(lines[after].text)) next = after;
  }
  return { block: { type: "list", ordered, from: parseInt(first[2], 10) || 1, items }, next };
}

/** Whether a line goes on with an item: indented text, a paragraph that just runs on, or blanks before either. */
function belongs(lines, at, indent) {
  if (isBlank(lines[at])) {
    const after = afterBlanks(lines, at);
    return after < lines.length && indentation(lines[after]) >= indent;
  }
  if (indentation(lines[at]) >= indent) return true;
  return !isBlank(lines[at - 1]) && !startsBlock(lines, at);
}

function readTable(lines, at) {
  const head = lines[at];
  if (!head.text.includes("|") || at + 1 >= lines.length || !TABLE_RULE.test(lines[at + 1].text)) return null;
  const header = cells(head);
  const aligns = cells(lines[at + 1]).map(({ text }) => {
    const [left, right] = [text.startsWith(":"), text.endsWith(":")];
    return left && right ? "center" : right ? "end" : "start";
  });
  if (aligns.length !== header.length) return null;
  const rows = [];
  let next = at + 2;
  while (next < lines.length && !isBlank(lines[next]) && lines[next].text.includes("|")) {
    const row = cells(lines[next]).slice(0, header.length);
    rows.push(row.map((cell) => parseInline([cell])));
    next += 1;
  }
  const block = { type: "table", aligns, header: header.map((cell) => parseInline([cell])), rows };
  return { block, next };
}

function cells(line) {
  const found = [];
  let from = line.text.search(/\S/);
  if (line.text[from] === "|") from += 1;
  const end = line.text.trimEnd().replace(/\|$/, "").length;
  for (let at = from; at <= end; at += 1) {
    if (at < end && (line.text[at] !== "|" || line.text[at - 1] === "\\")) continue;
    const raw = line.text.slice(from, at);
    found.push({ text: raw.trim(), start: line.start + from + (raw.length - raw.trimStart().length) });
    from = at + 1;
  }
  return found;
}

function readParagraph(lines, at, { isOpen }) {
  let next = at + 1;
  while (next < lines.length && !isBlank(lines[next]) && !startsBlock(lines, next)) next += 1;
  const inner = lines.slice(at, next).map((line) => without(line, indentation(line)));
  return { block: { type: "paragraph", children: parseInline(inner, isOpen && next === lines.length) }, next };
}

function startsBlock(lines, at) {
  const { text } = lines[at];
  return [FENCE, HEADING, RULE, QUOTE].some((pattern) => pattern.test(text)) || /^ *([-*+]|\d{1,9}[.)])[ \t]+\S/.test(text);
}

function isBlank(line) {
  return line.text.trim() === "";
}

function indentation(line) {
  return line.text.length - line.text.trimStart().length;
}

function afterBlanks(lines, at) {
  while (at < lines.length && isBlank(lines[at])) at += 1;
  return at;
}

function without(line, length) {
  return { text: line.text.slice(length), start: line.start + length };
}

// Inline -------------------------------------------------------------------------------------------

/** Parse the lines of one paragraph into leaves and spans ({type: "strong" | "emphasis" | "strike" | "inline-code" | "link"}). */
function parseInline(lines, isOpen = false) {
  return new Inline(lines, isOpen).span(0, 0);
}

class Inline {
  constructor(lines, isOpen) {
    this.isOpen = isOpen;
    this.text = lines.map((line) => line.text).join("\n");
    this.lines = [];
    let at = 0;
    for (const line of lines) {
      this.lines.push({ at, start: line.start });
      at += line.text.length + 1;
    }
    this.unmatched = new Set();
  }

  /** Nodes from `from` to `to` (an offset into the paragraph). */
  span(from, depth, to = this.text.length) {
    const nodes = [];
    let plain = from;
    let at = from;
    const flush = (until) => nodes.push(...this.leaves(plain, until));
    while (at < to) {
      const found = depth < MAX_DEPTH ? this.special(at, to, depth) : null;
      if (found?.nodes) {
        flush(at);
        nodes.push(...found.nodes);
        plain = found.next;
      }
      at = found?.next ?? at + 1;
    }
    flush(to);
    return nodes;
  }

  /** What a mark begins: {nodes, next}, or {next} where it is text like any other, or null where there is none. */
  special(at, to, depth) {
    switch (this.text[at]) {
      case "\\":
        return /[!-/:-@[-`{-~]/.test(this.text[at + 1] ?? "") ? { nodes: this.leaves(at + 1, at + 2), next: at + 2 } : null;
      case "`":
        return this.code(at, to);
      case "*":
      case "_":
      case "~":
        return this.delimited(at, to, depth);
      case "!":
      case "[":
        return this.link(at, to, depth);
      case "h":
        return this.address(at, to);
      default:
        return null;
    }
  }

  code(at, to) {
    const ticks = /^`+/.exec(this.text.slice(at, to))[0];
    let close = at + ticks.length;
    for (;;) {
      close = this.text.indexOf(ticks, close);
      if (close < 0 || close >= to) return this.unclosed("inline-code", at, ticks.length, to);
      const run = /^`+/.exec(this.text.slice(close))[0].length;
      if (run === ticks.length) break;
      close += run;
    }
    const node = { type: "inline-code", children: this.leaves(at + ticks.length, close) };
    return { nodes: [node], next: close + ticks.length };
  }

  delimited(at, to, depth) {
    const mark = this.text[at];
    const run = /^(.)\1*/.exec(this.text.slice(at, to))[0].length;
    const length = Math.min(run, 2);
    const skip = { next: at + run };
    const insideWord = mark === "_" && /[\p{L}\p{N}]/u.test(this.text[at - 1] ?? " ");
    if (run > 3 || (mark === "~" && run !== 2) || insideWord || /\s/.test(this.text[at + run] ?? " ")) return skip;
    const delimiter = mark.repeat(length);
    const close = this.closer(delimiter, at + length, to);
    if (close === null) return length === 2 ? this.unclosed("strong", at, run, to) : skip;
    const type = mark === "~" ? "strike" : length === 2 ? "strong" : "emphasis";
    const children = this.span(at + length, depth + 1, close);
    return { nodes: [{ type, children }], next: close + length };
  }

  /** A mark without its partner: text like any other, unless the partner may still come. */
  unclosed(type, at, length, to) {
    const from = at + length;
    if (!this.isOpen || to < this.text.length || from === to) return { next: from };
    return { nodes: [{ type, children: this.leaves(from, to) }], next: to };
  }

  closer(delimiter, from, to) {
    // One failed search says that there is none further right either.
    const key = `${delimiter}:${to}`;
    if (this.unmatched.has(key)) return null;
    const mark = delimiter[0];
    let at = from;
    while ((at = this.text.indexOf(delimiter, at)) >= 0 && at + delimiter.length <= to) {
      let end = at;
      while (this.text[end] === mark && end < to) end += 1;
      const run = end - at;
      const fits = run === delimiter.length || run === 3;
      const wordGoesOn = mark === "_" && /[\p{L}\p{N}]/u.test(this.text[end] ?? " ");
      if (fits && at > from && !/\s/.test(this.text[at - 1]) && !wordGoesOn) return end - delimiter.length;
      at = end;
    }
    this.unmatched.add(key);
    return null;
  }

  link(at, to, depth) {
    const image = this.text[at] === "!";
    const found = /^!?\[([^[\]]*)\]\(\s*<?([^\s()<>]*(?:\([^\s()<>]*\)[^\s()<>]*)*)>?(?:\s+"[^"]*")?\s*\)/.exec(this.text.slice(at, to));
    if (!found) return null;
    const label = at + (image ? 2 : 1);
    const children = this.span(label, depth + 1, label + found[1].length);
    const next = at + found[0].length;
    if (!SAFE_LINK.test(found[2])) return { nodes: children, next };
    return { nodes: [{ type: "link", href: found[2], children }], next };
  }

  address(at, to) {
    const found = /^https?:\/\/[^\s<>"'`]*[^\s<>"'`.,;:!?)\]*_~]/.exec(this.text.slice(at, to));
    if (!found || /[\p{L}\p{N}]/u.test(this.text[at - 1] ?? " ")) return null;
    const next = at + found[0].length;
    return { nodes: [{ type: "link", href: found[0], children: this.leaves(at, next) }], next };
  }

  /** The text between two offsets, one leaf per line: a paragraph in a quote is no contiguous piece of the source. */
  leaves(from, to) {
    const found = [];
    for (const [index, line] of this.lines.entries()) {
      const end = this.lines[index + 1]?.at ?? Infinity;
      const [left, right] = [Math.max(from, line.at), Math.min(to, end)];
      if (left >= right) continue;
      found.push({ type: "text", text: this.text.slice(left, right), start: line.start + left - line.at });
    }
    return found;
  }
}
