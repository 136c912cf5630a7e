// An answer's text as elements: Markdown's structure, with each piece marked by who wrote it.

import { element } from "./dom.js";
import { parse } from "./markdown.js";

const FLASH_MS = 1400;
const SPANS = { strong: "strong", emphasis: "em", strike: "s", "inline-code": "code" };

/** Keeps the elements of an answer in step with its state; blocks that did not change are left alone. */
export class Renderer {
  constructor(root) {
    this.root = root;
    this.rendered = [];
  }

  update(answer, now) {
    const source = answer.isThinking ? answer.text : answer.text + answer.provisional;
    const blocks = parse(source, !answer.isOver);
    const committed = answer.text.length;
    const rendered = blocks.map((block, index) => {
      // What its look depends on: its text, how much of it is confirmed, and whether it may go on.
      const confirmed = Math.min(committed, block.end);
      const goesOn = !answer.isOver && index === blocks.length - 1;
      const key = `${block.start}|${confirmed}|${goesOn}|${block.depth ?? ""}|${source.slice(block.start, block.end)}`;
      const before = this.rendered[index];
      return before?.key === key ? before : { key, node: renderBlock(block, new Pieces(answer, now)) };
    });
    for (const [index, { node }] of rendered.entries()) {
      const before = this.rendered[index]?.node;
      if (before === node) continue;
      if (before) before.replaceWith(node);
      else this.root.append(node);
    }
    for (const { node } of this.rendered.slice(rendered.length)) node.remove();
    this.rendered = rendered;
  }
}

/** Cuts leaves where the writer changes. */
class Pieces {
  constructor(answer, now) {
    this.answer = answer;
    this.now = now;
  }

  of(leaf) {
    const { segments, text } = this.answer;
    const end = leaf.start + leaf.text.length;
    const found = [];
    let at = leaf.start;
    for (let index = this.indexAt(at); at < end && index < segments.length; index += 1) {
      const until = Math.min(end, segments[index].end);
      found.push(this.piece(leaf.text.slice(at - leaf.start, until - leaf.start), segments[index], index));
      at = until;
    }
    if (at < end) {
      const first = at === text.length;
      found.push(element("span", { class: first ? "provisional first" : "provisional" }, [leaf.text.slice(at - leaf.start)]));
    }
    return found;
  }

  piece(text, segment, index) {
    const span = element("span", { class: `piece ${segment.origin}`, "data-index": index }, [text]);
    const age = this.now - segment.at;
    if (segment.origin === "correction" && age < FLASH_MS) {
      span.classList.add("flash");
      // Rendered again in mid-flash, it goes on where it was.
      span.style.animationDelay = `${-age}ms`;
    }
    return span;
  }

  /** Index of the segment that holds an offset; their number where none does. */
  indexAt(offset) {
    const { segments } = this.answer;
    let [low, high] = [0, segments.length];
    while (low < high) {
      const middle = (low + high) >> 1;
      if (segments[middle].end > offset) high = middle;
      else low = middle + 1;
    }
    return low;
  }
}

function renderBlock(block, pieces) {
  switch (block.type) {
    case "heading":
      // The page's and the turn's own headings are levels 1 and 2.
      return element(`h${Math.min(6, block.depth + 2)}`, {}, renderInline(block.children, pieces));
    case "code":
      return renderCode(block, pieces);
    case "quote":
      return element("blockquote", {}, block.children.map((child) => renderBlock(child, pieces)));
    case "list":
      return renderList(block, pieces);
    case "table":
      return renderTable(block, pieces);
    case "rule":
      return element("hr");
    default:
      return element("p", {}, renderInline(block.children, pieces));
  }
}

function renderCode(block, pieces) {
  const code = element("code", {}, block.children.flatMap((leaf) => pieces.of(leaf)));
  const copy = element("button", { type: "button", class: "copy", "data-copy": "code" }, ["Copy"]);
  const name = block.language ? `Code, ${block.language}` : "Code";
  return element("div", { class: "code" }, [
    element("div", { class: "code-bar" }, [element("span", {}, [block.language]), copy]),
    element("pre", { tabindex: "0", role: "group", "aria-label": name }, [code]),
  ]);
}

function renderList(block, pieces) {
  const items = block.items.map((children) => {
    const tight = children.length === 1 && children[0].type === "paragraph";
    return element("li", {}, tight ? renderInline(children[0].children, pieces) : children.map((child) => renderBlock(child, pieces)));
  });
  return block.ordered ? element("ol", { start: block.from === 1 ? null : block.from }, items) : element("ul", {}, items);
}

function renderTable(block, pieces) {
  const row = (cells, name, scope) =>
    element("tr", {}, cells.map((cell, index) =>
      element(name, { class: `to-${block.aligns[index]}`, scope }, renderInline(cell, pieces))));
  const table = element("table", {}, [
    element("thead", {}, [row(block.header, "th", "col")]),
    element("tbody", {}, block.rows.map((cells) => row(cells, "td", null))),
  ]);
  return element("div", { class: "wide", tabindex: "0", role: "group", "aria-label": "Table" }, [table]);
}

function renderInline(nodes, pieces) {
  return nodes.flatMap((node) => {
    if (node.type === "text") return pieces.of(node);
    const children = renderInline(node.children, pieces);
    if (node.type !== "link") return [element(SPANS[node.type], {}, children)];
    return [element("a", { href: node.href, target: "_blank", rel: "noopener noreferrer" }, children)];
  });
}
