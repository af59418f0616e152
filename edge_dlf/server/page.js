
// The conversation on the screen, and those that the browser keeps.
//
// talk: {id, at, system, sides: [{model, numbers}], turns: [{text, answers: [[answer, …], …], shown: [n, …]}]}
// A turn has for each side every answer that was given to it, and which of them is shown.
// answer: {how, tokens: [{text, thought, alpha, expert, chance, alone, instead}], figures, error}, see tokenOf

const COLOURS = {{colours}}, PREFIX = "edge-dlf talk ", MODES = ["gain", "alpha", "none"];
const $ = (query, from = document) => from.querySelector(query);
const store = (() => { try { return localStorage; } catch { return {}; } })();  // some browsers keep nothing
const running = new Map(), nodes = new WeakMap();  // answer on its way -> what stops it; answer -> its element
let models = [], experts = [], examples = [], talk = {system: "", sides: [], turns: []};

function make(tag, parent, text, set = {}) {
  const node = document.createElement(tag);
  if (text !== undefined) node.textContent = text;
  for (const [name, value] of Object.entries(set)) node[name] = value;
  parent.append(node);
  return node;
}

function button(parent, text, title, onclick) { return make("button", parent, text, {type: "button", title, onclick}); }

// What the browser keeps: each conversation under a key of its own, so that tabs do not overwrite one another.

function fresh(sides = [{}]) {
  return {id: Date.now().toString(36) + Math.random().toString(36).slice(2, 6), system: talk.system, sides, turns: []};
}

function kept() {
  const talks = Object.keys(store).filter((name) => name.startsWith(PREFIX)).map((name) => JSON.parse(store[name]));
  return talks.sort((a, b) => b.at - a.at);
}

function save(talk) {
  if (!talk.turns.length) return;
  talk.at = Date.now();
  for (;;) {  // while the browser gives no more room, the oldest conversation goes
    try { store[PREFIX + talk.id] = JSON.stringify(talk); break; } catch {
      const oldest = kept().filter(({id}) => id !== talk.id).at(-1);
      if (!oldest) break;
      delete store[PREFIX + oldest.id];
    }
  }
  drawList();
}

function drawList() {
  $("#talks ul").replaceChildren();
  for (const {id, turns} of kept()) {
    const item = make("li", $("#talks ul"), undefined, {className: id === talk.id ? "here" : ""});
    button(item, turns[0].text.slice(0, 80), turns[0].text.slice(0, 500), () => open(id));
    button(item, "×", "Delete this conversation", () => {
      if (!confirm(`Delete “${turns[0].text.slice(0, 80)}”?`)) return;
      delete store[PREFIX + id];
      if (id !== talk.id) { drawList(); return; }
      talk.turns.length = 0;  // an answer on its way does not bring it back
      begin(fresh());
    });
  }
}

function open(id) {
  const stored = store[PREFIX + id];
  if (stored && id !== talk.id) begin(JSON.parse(stored)); else if (isNarrow()) list(false);
}

function begin(next) {
  stop();
  talk = next;
  talk.sides.forEach((side) => { if (!modelOf(side)) Object.assign(side, {model: models[0].id, numbers: undefined}); });
  history.replaceState(null, "", talk.turns.length ? `#${talk.id}` : location.pathname);
  if (isNarrow()) list(false);
  $("#system textarea").value = talk.system;
  drawSystem();
  drawList();
  draw();
  if (!isNarrow()) $("#text").focus();  // a phone would cover the page with its keyboard
}

// Asking.

function answering() { return running.size > 0; }
function stop() { running.forEach((control) => control.abort()); }
function modelOf(side) { return models.find(({id}) => id === side.model); }

function numbersOf(side) {  // [field of the request, {name: number}], where the method has any
  const {alpha, weights} = modelOf(side);
  return alpha ? ["alpha", side.numbers ?? alpha] : weights ? ["weights", side.numbers ?? weights] : [];
}

function bodyOf(side, messages) {
  const [field] = numbersOf(side), own = side.numbers && {[field]: side.numbers, ...(field === "weights" && {method: "weighted"})};
  return {model: side.model, messages, stream: true, edge_dlf: {trace: true, ...own}};
}

function messagesOf(s) {
  const system = talk.system.trim() ? [{role: "system", content: talk.system}] : [];
  const said = talk.turns.flatMap((turn) => [{role: "user", content: turn.text}, {role: "assistant", content: textOf(shownOf(turn, s))}]);
  return [...system, ...said.slice(0, -1)];
}

function shownOf(turn, s) { return turn.answers[s]?.[turn.shown[s]]; }
function textOf(given) { return given ? given.tokens.map(({text}) => text).join("") : ""; }

function send(text) {
  talk.turns.push({text, answers: talk.sides.map(() => []), shown: talk.sides.map(() => 0)});
  talk.sides.forEach((_, s) => answer(s));
}

async function answer(s) {  // once more, where the last turn has an answer already
  const from = talk, turn = talk.turns.at(-1), side = talk.sides[s], messages = messagesOf(s), control = new AbortController();
  const given = {how: nameOf(modelOf(side)).replace(/,.*/, "") + (side.numbers ? ", own numbers" : ""), tokens: []};
  turn.shown[s] = turn.answers[s].push(given) - 1;
  running.set(given, control);
  draw();
  history.replaceState(null, "", `#${talk.id}`);
  const log = $(".log", panes()[s]);
  log.scrollTop = log.scrollHeight;
  await receive(given, bodyOf(side, messages), control.signal, onFrame(() => {
    const isNear = log.scrollHeight - log.scrollTop - log.clientHeight < 60;
    nodes.get(given).write();
    if (isNear) log.scrollTop = log.scrollHeight;
  }));
  running.delete(given);
  save(from);
  if (shownOf(turn, s) === given) nodes.get(given).replaceWith(answerNode(given, turn, s));
  refresh();
}

function onFrame(work) { let asked = 0; return () => { asked ||= requestAnimationFrame(() => { asked = 0; work(); }); }; }

function again() { if (talk.turns.length && !answering()) talk.sides.forEach((_, s) => answer(s)); }

function compare() {
  stop();
  if (talk.sides.length > 1) {
    talk.sides.pop();
    talk.turns.forEach(({answers: [own, others]}) => {  // which stay, as versions
      const known = new Set(own.map((given) => JSON.stringify(given)));
      own.push(...others.filter((given) => given && !known.has(JSON.stringify(given))));
    });
    talk.turns.forEach((turn) => { turn.answers.length = turn.shown.length = 1; });
    save(talk);
    draw();
    return;
  }
  const other = models.find(({id}) => id.endsWith(":large") && id !== talk.sides[0].model) ?? models[0];
  talk.sides.push({model: other.id});
  talk.turns.forEach((turn, k) => {
    const isLast = k === talk.turns.length - 1;
    turn.answers.push(isLast ? [] : [shownOf(turn, 0)].filter(Boolean));
    turn.shown.push(0);
  });
  if (talk.turns.length) answer(1); else draw();
}

// Drawing.

function nameOf({id, method}) {
  const way = id.includes(":") && id.slice(id.indexOf(":") + 1);
  if (!way) return `${method}, the family’s own`;
  return way === method ? (way === "large" || experts.includes(way) ? `${way} alone` : way) : `profile ${way}`;
}

function panes() { return [...document.querySelectorAll("main > section")]; }

function refresh() { $("#send").textContent = answering() ? "Stop" : "Send"; }

function draw() {
  refresh();
  $("#compare").setAttribute("aria-pressed", talk.sides.length > 1);
  $("#legend").hidden = !talk.turns.length;
  while (panes().length > talk.sides.length) panes().at(-1).remove();
  while (panes().length < talk.sides.length) $("main").append($("#pane").content.cloneNode(true));
  panes().forEach(drawPane);
}

function drawPane(pane, s) {
  const side = talk.sides[s], select = $("select", pane), log = $(".log", pane), top = log.scrollTop;
  select.replaceChildren(...models.map((model) => new Option(nameOf(model), model.id)));
  select.value = side.model;
  select.onchange = () => { Object.assign(side, {model: select.value, numbers: undefined}); renew(s); };
  drawNumbers(pane, s);
  log.replaceChildren();
  if (!talk.turns.length && s === 0) drawWelcome(log);
  talk.turns.forEach((turn, k) => {
    drawUser(log, turn, k);
    const given = shownOf(turn, s);
    if (given) log.append(answerNode(given, turn, s));
  });
  log.scrollTop = top;
}

function drawNumbers(pane, s) {
  const side = talk.sides[s], [field, numbers] = numbersOf(side), fold = $(".weights", pane), shown = `${talk.id} ${side.model}`;
  fold.hidden = !field;
  if (!field) return;
  if (fold.dataset.shown !== shown) {  // a slider in use stays
    fold.dataset.shown = shown;
    fillNumbers($("div", fold), side, field, numbers, () => renew(s), () => { delete fold.dataset.shown; });
  }
  $("summary", fold).textContent = (field === "alpha" ? "α of each expert" : "Weights") + (side.numbers ? " · own" : "");
  $("button", fold).hidden = !side.numbers;
}

function fillNumbers(box, side, field, numbers, renew, forget) {
  box.replaceChildren();
  for (const [name, number] of Object.entries(numbers)) {
    const label = make("label", box, name), bounds = {min: field === "alpha" ? 0 : Math.min(-1, number), max: Math.max(2, number)};
    const input = make("input", label, undefined, {type: "range", ...bounds, step: 0.01, value: number});
    const output = make("output", label, number.toFixed(2));
    input.oninput = () => { output.textContent = (+input.value).toFixed(2); };
    input.onchange = () => { side.numbers = {...numbersOf(side)[1], [name]: +input.value}; renew(); };
  }
  button(box, "Reset", "The family’s own numbers", () => { delete side.numbers; forget(); renew(); });
}

function renew(s) { stop(); if (talk.turns.length) answer(s); else draw(); }

function drawWelcome(log) {
  log.append($("#welcome").content.cloneNode(true));
  $("h2", log).textContent = `Try ${models[0].id}`;
  $(".names", log).textContent = experts.join(", ");
  examples.slice(0, 4).forEach((text) => button($(".examples", log), text, "", () => send(text)));
  if (!examples.length) make("p", $(".examples", log), "Questions that family.toml names under examples stand here.", {className: "dim"});
}

function drawUser(log, turn, k) {
  const node = make("div", log, undefined, {className: "user"});
  make("div", node, turn.text, {className: "text"});
  const tools = make("div", node, undefined, {className: "tools"});
  button(tools, "Edit", "Edit, and answer anew from here", () => edit(node, turn, k));
  button(tools, "Copy", "", (event) => copy(turn.text, event.target));
}

function edit(node, turn, k) {
  const area = make("textarea", node, undefined, {value: turn.text, rows: Math.min(12, turn.text.split("\n").length + 1), ariaLabel: "Message"});
  const done = () => { if (!area.value.trim()) return; stop(); talk.turns.length = k; send(area.value.trim()); };
  area.onkeydown = (event) => {
    if (isSend(event)) { event.preventDefault(); done(); }
    if (event.key === "Escape") { event.stopPropagation(); draw(); $("#text").focus(); }
  };
  const tools = make("div", node, undefined, {className: "tools"});
  button(tools, "Send", "Enter; what follows in the conversation is asked anew", done);
  button(tools, "Cancel", "Escape", draw);
  node.replaceChildren(area, tools);
  area.focus();
}

function answerNode(given, turn, s) {
  const node = document.createElement("div"), isLive = running.has(given);
  node.className = "answer";
  nodes.set(given, node);
  node.ariaBusy = isLive;
  node.write = writerOf(given, node, isLive);
  node.write();
  if (given.error) make("div", node, given.error, {className: "wrong"});
  const tools = make("div", node, undefined, {className: "tools"}), all = turn.answers[s], n = turn.shown[s];
  const n_changed = !isLive && given.tokens.filter(({instead}) => instead !== undefined).length;
  const figures = [given.how, isLive ? "…" : given.figures, n_changed && `${n_changed} changed by the experts`];
  make("span", tools, figures.filter(Boolean).join(" · "), {className: "figures", title: given.wait ?? ""});
  if (isLive) return node;
  if (all.length > 1) {
    const turnTo = (next) => () => { turn.shown[s] = next; save(talk); draw(); };
    button(tools, "‹", "The answer before", turnTo(n - 1)).disabled = n === 0;
    make("span", tools, `${n + 1} of ${all.length}`);
    button(tools, "›", "The answer after", turnTo(n + 1)).disabled = n === all.length - 1;
  }
  button(tools, "Copy", "", (event) => copy(textOf(given), event.target));
  if (turn === talk.turns.at(-1)) button(tools, "Regenerate", "Alt+R", () => { if (!answering()) answer(s); });
  return node;
}

function writerOf(given, node, isLive) {  // thinking goes into a fold, which closes once the answer begins
  const write = markdownOf(given, make("div", node, undefined, {className: "text"}));
  let fold, n = 0;
  return () => {
    for (const token of given.tokens.slice(n)) {
      if (token.thought) span(fold ??= foldOf(node, isLive), token, token.thought);
      if (token.text && fold && !node.dataset.begun) fold.open = !(node.dataset.begun = true);
    }
    n = given.tokens.length;
    write();
  };
}

function foldOf(node, isOpen) {
  const fold = document.createElement("details");
  make("summary", fold, "Thinking");
  fold.open = isOpen;
  node.prepend(fold);
  return fold;
}

function span(parent, token, text) {
  const node = make("span", parent, text, {className: "token"});
  if (!token.expert) return node;
  const percent = (part) => `${(100 * part).toFixed(1)}%`, alone = token.alone === null ? "less" : percent(token.alone ?? 0);
  node.dataset.alpha = token.alpha;
  node.dataset.gain = token.alone === undefined ? 0 : Math.max(0, token.chance - (token.alone ?? 0));
  node.title = `${token.expert} · α ${token.alpha.toFixed(2)} · probability ${percent(token.chance)}`
    + (token.alone === undefined ? "" : `, by the large model alone ${alone}`)
    + (token.instead === undefined ? "" : `, which would have said ${JSON.stringify(token.instead)}`);
  node.classList.toggle("changed", token.instead !== undefined);
  node.style.setProperty("--hue", hueOf(token.expert));
  paint(node);
  return node;
}

function hueOf(expert) { return COLOURS[Math.max(0, experts.indexOf(expert)) % COLOURS.length].join(" "); }

function paint(node) {
  const part = $("#colour").value === "alpha" ? Math.min(1, Math.abs(node.dataset.alpha) / 2) : +node.dataset.gain;
  node.style.setProperty("--part", part.toFixed(3));
}

function colour(mode) {
  $("#colour").value = mode;
  try { store["edge-dlf colour"] = mode; } catch { /* the browser gives no more room */ }
  document.body.classList.toggle("uncoloured", mode === "none");
  document.querySelectorAll(".token[data-alpha]").forEach(paint);
}

function drawSystem() { $("#system .dim").textContent = talk.system.trim() ? `· ${talk.system}` : "· none"; }

async function copy(text, from) {
  try { await navigator.clipboard.writeText(text); } catch {  // a page that came over plain HTTP has no clipboard
    const area = make("textarea", document.body, undefined, {value: text});
    area.select();
    document.execCommand("copy");
    area.remove();
  }
  from.textContent = "Copied";
}

// Keys and buttons.

function list(isShown) {
  $("#talks").hidden = !isShown;
  $("#list").ariaExpanded = isShown;
  $("#talk").inert = isShown && isNarrow();
}

function isNarrow() { return innerWidth <= 640; }
function isSend(event) { return event.key === "Enter" && !event.shiftKey && !event.isComposing; }
function grow() { const area = $("#text"); area.style.height = "auto"; area.style.height = `${area.scrollHeight + 2}px`; }

function submit(event) {
  event?.preventDefault();
  if (answering()) { stop(); return; }
  const text = $("#text").value.trim();
  if (!text || !models.length) return;
  $("#text").value = "";
  grow();
  send(text);
}

const actions = {
  KeyA: () => colour(MODES[(MODES.indexOf($("#colour").value) + 1) % MODES.length]),
  KeyC: compare,
  KeyL: () => list($("#talks").hidden),
  KeyN: () => begin(fresh(talk.sides.map((side) => ({...side})))),
  KeyR: again,
  KeyS: () => { $("#system").open = !$("#system").open; $($("#system").open ? "#system textarea" : "#text").focus(); },
};

async function start() {
  try {
    const offered = await (await ask("v1/models")).json();
    models = offered.data;
    ({experts} = models[0]);
    ({examples} = offered.edge_dlf);
  } catch (error) {
    $("main").replaceChildren();
    make("div", $("main"), error.message, {className: "bar wrong"});
    return;
  }
  $("#key").hidden = true;
  $("main").replaceChildren();
  $("h1").textContent = document.title = models[0].id;
  $("#experts").replaceChildren();
  for (const name of experts) {
    const node = make("span", $("#experts"));
    make("i", node).style.setProperty("--hue", hueOf(name));
    node.append(name);
  }
  const stored = store[PREFIX + location.hash.slice(1)];
  begin(stored ? JSON.parse(stored) : fresh());
  list(!isNarrow() && kept().length > 0);
}

$("form").onsubmit = submit;
$("#compare").onclick = compare;
$("#new").onclick = actions.KeyN;
$("#list").onclick = actions.KeyL;
$("#room").onclick = (event) => { if (event.target === $("#room")) list(false); };
$("#colour").onchange = () => colour($("#colour").value);
$("#key").onchange = () => { key = $("#key").value; start(); };
$("#system textarea").oninput = (event) => { talk.system = event.target.value; drawSystem(); };
$("#text").oninput = grow;
$("#text").onkeydown = (event) => {
  if (isSend(event)) submit(event);
  const edits = document.querySelectorAll("section:first-child .user .tools button:first-child");
  if (event.key === "ArrowUp" && !event.target.value && edits.length && !answering()) { event.preventDefault(); edits[edits.length - 1].click(); }
};
document.onkeydown = (event) => {
  if (event.key === "Escape") { stop(); if (isNarrow()) list(false); }
  const action = event.altKey && !event.ctrlKey && actions[event.code];
  if (action && models.length) { event.preventDefault(); action(); }
};
window.onpagehide = () => { if (answering()) save(talk); };
window.onstorage = drawList;
colour(MODES.includes(store["edge-dlf colour"]) ? store["edge-dlf colour"] : "gain");
start();
