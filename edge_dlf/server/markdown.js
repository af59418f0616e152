
// Markdown of an answer, drawn while it comes. Every character stays in the page, in the span of its token; markup is only
// hidden. So whatever a model says is text, and nothing of it is lost.

const FENCE = /^(`{3,}|~{3,})/, HEADING = /^(#{1,6})[ \t]+/, RULE = /^([-*_])([ \t]*\1){2,}[ \t]*$/, QUOTE = /^>[ \t]?/;
const ITEM = /^([-*+]|\d{1,9}[.)])[ \t]+/, COLUMNS = /^\|?[ \t]*:?-+:?[ \t]*(\|[ \t]*:?-+:?[ \t]*)*\|?[ \t]*$/;
const TAGS = {"*": ["em"], _: ["em"], "**": ["strong"], __: ["strong"], "***": ["strong", "em"], "~~": ["del"]};
// An escape; a piece of code; or strong, slanted or struck-out words. `2**3`, `a*b*c` and `snake_case` are none of them.
const INLINE = /\\[\\`*_~|#]|(?<!`)(`+)(?!`)[^]{1,2000}?(?<!`)\1(?!`)|(?<![\w)\]*~])(\*{1,3}|_{1,2}|~~)(?!\s|\2)[^]{0,1000}?[^\s*~\\]\2(?![\d([*~]|(?<=_)\w)/g;

function lineOf(text, at) {
  const end = text.indexOf("\n", at) + 1 || text.length, line = text.slice(at, end).trimEnd(), body = line.trimStart();
  return {at, end, line, body, indent: line.slice(0, line.length - body.length).replaceAll("\t", "    ").length, from: at + line.length - body.length};
}

function cellsOf(row) { return row.replace(/^\||(?<!\\)\|$/g, "").split(/(?<!\\)\|/).length; }
function isClosing(body, fence) { return body.startsWith(fence) && body === fence[0].repeat(body.length); }

function kindOf(text, {body, end}) {
  const next = body.includes("|") && lineOf(text, end).body;
  return !body ? "blank" : FENCE.test(body) ? "pre" : HEADING.test(body) ? "h" : RULE.test(body) ? "rule" : ITEM.test(body) ? "li"
    : QUOTE.test(body) ? "blockquote" : next && next.includes("|") && COLUMNS.test(next) && cellsOf(next) === cellsOf(body) ? "table" : "p";
}

// The block that begins at `at`: its kind and lines, and where the next one begins.
function blockAt(text, at) {
  let line = lineOf(text, at);
  while (!line.body && line.end < text.length) line = lineOf(text, line.end);
  const kind = kindOf(text, line), [fence] = line.body.match(FENCE) ?? [], lines = [line];
  const isWithin = {
    pre: () => lines.length === 1 || !isClosing(lines.at(-1).body, fence),
    table: ({body}) => body.includes("|"),
    p: (next) => kindOf(text, next) === "p",
    li: (next) => kindOf(text, next) === "p",
  }[kind] ?? (() => false);
  let end = line.end;
  for (let next; end < text.length && isWithin(next = lineOf(text, end)); end = next.end) lines.push(next);
  for (let next; end < text.length && !(next = lineOf(text, end)).body;) end = next.end;
  return {kind, lines, at, end, indent: line.indent, from: line.from};
}

// Return a function that draws into `box` what an answer says by now. It draws the last block anew, and what came since.
function markdownOf(given, box) {
  let kept = {at: 0, k: 0, begun: 0}, last, before;  // kept: where the last block begins, as a place in the tokens
  let tokens = [], text = "", at = 0, k = 0, begun = 0;  // what is drawn: all before `at`, which is in token k, which begins at `begun`

  function write(parent, to, isMark = false) {
    while (k < tokens.length && (at < to || !tokens[k].text)) {
      const end = begun + tokens[k].text.length, until = Math.min(end, Math.max(to, at));
      span(parent, tokens[k], text.slice(at, until)).classList.toggle("mark", isMark);
      at = until;
      if (at < end) break;
      k++;
      begun = end;
    }
  }

  function inline(parent, to) {
    const base = at;
    for (const {0: {length}, 1: ticks, 2: style, index} of text.slice(at, to).matchAll(INLINE)) {
      const begin = base + index, mark = ticks ?? style ?? "\\";
      write(parent, begin);
      write(parent, begin + mark.length, true);
      if (mark === "\\") continue;
      if (ticks) write(make("code", parent), begin + length - mark.length);
      else inline(TAGS[style].reduce((node, tag) => make(tag, node), parent), begin + length - mark.length);
      write(parent, begin + length, true);
    }
    write(parent, to);
  }

  function row(table, {from, body}, tag) {
    const node = make("tr", table), cells = body.split(/(?<!\\)\|/);
    cells.forEach((cell, n) => {
      const end = from + cell.length, isEdge = !cell && (n === 0 || n === cells.length - 1);
      if (!isEdge) write(node, end - cell.trimStart().length, true);
      if (!isEdge) inline(make(tag, node), from + cell.trimEnd().length);
      from = end + 1;
    });
    write(node, from - 1, true);
  }

  function draw({kind, lines, from, end, indent}) {
    let within = last?.closest("li");
    while (within && indent < within.indent + 2) within = within.parentElement.closest("li");
    const home = within ?? box, [{body}] = lines, [mark = ""] = body.match({h: HEADING, li: ITEM, blockquote: QUOTE}[kind] ?? /^/);
    const to = lines.at(-1).at + lines.at(-1).line.length;
    const tag = {h: `h${Math.min(6, mark.trim().length + 2)}`, rule: "div", blank: "p"}[kind] ?? kind;
    const list = kind === "li" && (/\d/.test(mark) ? "ol" : "ul"), beside = home.lastElementChild;
    const node = make(tag, !list ? home : beside?.localName === list ? beside : make(list, home));
    write(node, kind === "p" && !within ? lines[0].at : from + mark.length, true);
    Object.assign(node, list && {indent}, list === "ol" && {value: parseInt(mark)}, kind === "rule" && {className: "rule"});
    if (kind === "pre") code(node, lines, indent);
    else if (kind === "table") lines.forEach((line, n) => { if (n === 1) write(node, line.end, true); else row(node, line, n ? "td" : "th"); });
    else if (kind !== "rule") inline(node, to);
    write(node, end, true);
    return node;
  }

  function code(pre, [{body}, ...lines], indent) {
    if (lines.length && isClosing(lines.at(-1).body, body.match(FENCE)[0])) lines.pop();
    if (lines.length) write(pre, lines[0].at, true);
    const node = make("code", pre);
    for (const line of lines) {
      write(node, line.at);
      write(node, line.at + Math.min(indent, line.from - line.at), true);
      write(node, line.at + line.line.length);
    }
  }

  return () => {
    tokens = given.tokens.filter((token) => token.text || !token.thought);
    text = textOf(given);
    ({at, k, begun} = kept);
    const list = last?.parentElement;
    last?.remove();
    if (list && list !== box && !list.childNodes.length) list.remove();
    last = before;
    while (at < text.length) {
      kept = {at, k, begun};
      before = last;
      last = draw(blockAt(text, at));
    }
  };
}
