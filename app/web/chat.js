/**
 * The chat page of Cleave.
 *
 * What the server sends (answers, titles, passages, addresses) was written by others. It enters the page as text
 * nodes only, and an address becomes a link only through `link`, which takes nothing but http and https.
 *
 * In order: settings, DOM, server, Markdown, answer status, sources, conversation, documents, start.
 */

// ---------------------------------------------------------------------------------------------- settings

/** Questions that the sample documents answer; the last one names its author. */
const EXAMPLES = [
  "How long did the Reading Room outage on 14 October 2025 last?",
  "What did capping max_num_seqs at 64 do to Hedgerow's p95 time to first token?",
  "In Noor Hallivant's account, how many of the unanswerable questions did the 4-bit candidate answer?",
];

const MODEL = "cleave";
const KEY = "cleave-key";
const DOCUMENTS_PER_PAGE = 100;

/** How an answer was made, by the server's `grounded`. */
const GROUNDING = {
  model: "Written by the language model and checked against the sources",
  mixed: "Partly written by the language model and checked, partly quoted from the sources",
  quotes: "Quoted from the sources",
  refused: "The documents do not hold an answer",
  flagged: "Written by the language model; the sources do not support all of it",
  unchecked: "Written by the language model, not checked against the sources",
};

/** What is missing from a degraded answer; a reason that is not listed is shown as the server names it. */
const DEGRADED = {
  llm_unavailable: "the language model is not available",
  overloaded: "the language model has too many requests",
  passages_dropped: "not all passages fitted into the prompt",
  llm_timeout: "the language model was too slow",
  llm_failed: "the language model failed on the way",
  history_trimmed: "the beginning of the conversation no longer fits",
  reranking_skipped: "the passages could not be reranked in time",
  rewriting_skipped: "the question was searched for as it is",
};

// --------------------------------------------------------------------------------------------------- DOM

const byId = (id) => document.getElementById(id);

/** Make an element. `on…` attributes are listeners, strings among the children become text nodes. */
function el(tag, attributes = {}, ...children) {
  const node = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (typeof value === "function") node.addEventListener(name.slice(2), value);
    else if (value !== undefined) node.setAttribute(name, value);
  }
  node.append(...children.filter(Boolean));
  return node;
}

/** A button that does not submit the form around it. */
function button(label, attributes) {
  return el("button", { type: "button", ...attributes }, label);
}

/** A link to an http(s) address, else null. A path counts: it resolves to this server. */
function link(address, label) {
  if (!URL.canParse(address, location.origin)) return null;
  const url = new URL(address, location.origin);
  if (!["http:", "https:"].includes(url.protocol)) return null;
  return el("a", { href: url.href, target: "_blank", rel: "noopener" }, label);
}

/** A document's title, linked where its address is a web address: a bare file name is no path on this server. */
function linkedTitle({ title, url }) {
  const label = title || "Untitled";
  return (/^https?:\/\//i.test(url ?? "") && link(url, label)) || label;
}

/** "author · platform · date", as far as they are known. */
function byline(metadata = {}) {
  const date = String(metadata.date ?? "").replace(/T.*/, "");
  return [metadata.author, metadata.platform, date].filter(Boolean).join(" · ");
}

function number(value) {
  return value.toLocaleString();
}

function plural(count, noun) {
  return `${number(count)} ${noun}${count === 1 ? "" : "s"}`;
}

/** A name of the API in words. */
function spoken(name) {
  return name.replaceAll("_", " ");
}

function duration(ms) {
  return ms < 1000 ? `${Math.round(ms)} ms` : `${(ms / 1000).toFixed(1)} s`;
}

function errorBox(error, retry) {
  return el("div", { class: "error", role: "alert" },
    el("p", {}, error.message),
    error.detail && el("p", { class: "small" }, error.detail),
    retry && button("Try again", { class: "retry", onclick: retry }));
}

function announce(text) {
  byId("announcer").textContent = text;
}

// ------------------------------------------------------------------------------------------------ server

/** A failed request. `message` is for the reader, `detail` for whoever looks into it. */
class RequestError extends Error {
  constructor(message, detail = "") {
    super(message);
    this.detail = detail;
  }
}

/** A stop by the reader stays an AbortError; all else that fetch and read throw means a lost connection. */
function connectionError(error, message) {
  return error.name === "AbortError" ? error : new RequestError(message, error.message);
}

async function request(path, options) {
  const key = sessionStorage.getItem(KEY);
  const response = await send(path, options, key);
  if (response.status === 401) {
    // Another request may have asked for a key since this one was sent.
    const isNew = key !== sessionStorage.getItem(KEY);
    if (isNew || await askForKey(await responseError(response.clone()))) return request(path, options);
  }
  if (!response.ok) throw await responseError(response);
  return response;
}

/** Send a request with the reader's key, if there is one. */
function send(path, options = {}, key = null) {
  const headers = { ...options.headers, ...(key && { authorization: `Bearer ${key}` }) };
  return fetch(path, { ...options, headers }).catch((error) => {
    throw connectionError(error, "The server cannot be reached.");
  });
}

let keyQuestion = null;

/** Ask the reader for a key, which this tab keeps until it is closed; false if none is given. All ask at once. */
function askForKey(refusal) {
  keyQuestion ??= new Promise((resolve) => {
    const dialog = byId("key-dialog");
    byId("key-refusal").textContent = refusal.message;
    byId("key").value = "";
    dialog.returnValue = "";
    dialog.addEventListener("close", () => {
      keyQuestion = null;
      const key = byId("key").value.trim();
      byId("key").value = "";
      const isGiven = dialog.returnValue === "use" && key !== "";
      if (isGiven) sessionStorage.setItem(KEY, key);
      resolve(isGiven);
    }, { once: true });
    dialog.showModal();
  });
  return keyQuestion;
}

async function requestJson(path, options) {
  return (await request(path, options)).json();
}

/** The server's own words where it sent any: a proxy in front of it may answer with HTML. */
async function responseError(response) {
  const { error } = await response.json().catch(() => ({}));
  const seconds = Number(response.headers.get("retry-after"));
  const wait = seconds > 0 ? ` Try again in ${plural(seconds, "second")}.` : "";
  const message = error?.message ?? "The server could not handle the request.";
  return new RequestError(message + wait, [`HTTP ${response.status}`, error?.code].filter(Boolean).join(", "));
}

/** The `data:` lines of a server-sent event stream. The API sends one line per event; comments are keep-alives. */
async function* eventData(stream) {
  const reader = stream.pipeThrough(new TextDecoderStream()).getReader();
  let pending = "";
  try {
    for (;;) {
      const { value, done } = await reader.read().catch((error) => {
        throw connectionError(error, "The connection to the server was lost.");
      });
      if (done) return;
      const lines = (pending + value).split("\n");
      pending = lines.pop();
      for (const line of lines) {
        if (line.startsWith("data:")) yield line.slice("data:".length).trim();
      }
    }
  } finally {
    reader.cancel().catch(() => {});
  }
}

/** The chunks of one streamed completion. A stream that ends without `[DONE]` was cut off. */
async function* completionChunks(messages, signal) {
  const response = await request("/v1/chat/completions", {
    method: "POST",
    headers: { "content-type": "application/json" },
    body: JSON.stringify({ model: MODEL, messages, stream: true, stream_options: { include_usage: true } }),
    signal,
  });
  for await (const data of eventData(response.body)) {
    if (data === "[DONE]") return;
    const chunk = JSON.parse(data);
    if (chunk.error) throw new RequestError(chunk.error.message, chunk.error.code);
    yield chunk;
  }
  throw new RequestError("The connection closed before the answer was complete.");
}

// ---------------------------------------------------------------------------------------------- Markdown
// The little of it that answers use. Text becomes blocks (plain data), blocks become nodes.

const MAX_NESTING = 6;

const FENCE = /^\s*(`{3,}|~{3,})[^`]*$/;
const HEADING = /^#{1,6}\s+(.+)$/;
const RULE = /^\s*([-*_])(\s*\1){2,}\s*$/;
const QUOTE = /^\s{0,3}>\s?/;
const ITEM = /^(\s*)([-*+]|\d{1,9}[.)])\s+/;
const STARTS_BLOCK = [FENCE, HEADING, RULE, QUOTE, ITEM];

const INLINE = new RegExp([
  /`(?<code>[^`\n]+)`/,
  /\*\*(?<strong>[^\s*].*?)\*\*/,
  /\*(?<em>[^\s*](?:[^*\n]*[^\s*])?)\*/,
  /\[(?<label>[^[\]\n]+)\]\((?<href>[^\s()]+)\)/,
  / ?\[(?<cited>\d{1,3})\](?!\()/, // The space goes: a superscript stands at its word.
  /(?<url>https?:\/\/[^\s<>]*[^\s<>.,;:!?'")\]])/,
].map((pattern) => pattern.source).join("|"), "g");

const isBlank = (line) => line.trim() === "";
const indentOf = (line) => line.length - line.trimStart().length;

function parseBlocks(lines, nesting = 0) {
  const blocks = [];
  let at = 0;
  while (at < lines.length) {
    if (isBlank(lines[at])) {
      at += 1;
      continue;
    }
    const [block, next] = takeBlock(lines, at, nesting);
    blocks.push(block);
    at = next;
  }
  return blocks;
}

/** The block that starts at a line, and where the next one starts. */
function takeBlock(lines, at, nesting) {
  const line = lines[at];
  if (FENCE.test(line)) return takeCode(lines, at);
  if (HEADING.test(line)) return [{ kind: "heading", text: HEADING.exec(line)[1] }, at + 1];
  if (RULE.test(line)) return [{ kind: "rule" }, at + 1];
  // A line of a thousand ">" must not exhaust the stack.
  if (nesting < MAX_NESTING && QUOTE.test(line)) return takeQuote(lines, at, nesting);
  if (nesting < MAX_NESTING && ITEM.test(line)) return takeList(lines, at, nesting);
  return takeParagraph(lines, at);
}

/** While an answer streams in, the closing fence is often still missing: then all the rest is code. */
function takeCode(lines, at) {
  const fence = FENCE.exec(lines[at])[1];
  let end = at + 1;
  while (end < lines.length && !lines[end].trim().startsWith(fence)) end += 1;
  return [{ kind: "code", text: lines.slice(at + 1, end).join("\n") }, end + 1];
}

function takeQuote(lines, at, nesting) {
  let end = at;
  while (end < lines.length && QUOTE.test(lines[end])) end += 1;
  const inner = lines.slice(at, end).map((line) => line.replace(QUOTE, ""));
  return [{ kind: "quote", blocks: parseBlocks(inner, nesting + 1) }, end];
}

function takeList(lines, at, nesting) {
  const [, indent, bullet] = ITEM.exec(lines[at]);
  const start = parseInt(bullet, 10);
  const ordered = !Number.isNaN(start);
  const isItem = (line) => ITEM.test(line) && /^\s*\d/.test(line) === ordered;
  const items = [];
  let next = at;
  while (next < lines.length && isItem(lines[next])) {
    const end = endOfItem(lines, next, indent.length);
    const width = ITEM.exec(lines[next])[0].length;
    const inner = lines.slice(next, end).map((line, i) => line.slice(i ? Math.min(indentOf(line), width) : width));
    items.push(parseBlocks(inner, nesting + 1));
    next = skipBlank(lines, end);
  }
  return [{ kind: "list", ordered, start, items }, next];
}

/** An item goes on over deeper lines, also past a blank one, and over plain text that directly follows it. */
function endOfItem(lines, at, indent) {
  let end = at + 1;
  while (end < lines.length) {
    const content = skipBlank(lines, end);
    const deeper = content < lines.length && indentOf(lines[content]) > indent;
    if (!deeper && (isBlank(lines[end]) || startsBlock(lines[end]))) break;
    end = content + 1;
  }
  return end;
}

function takeParagraph(lines, at) {
  let end = at + 1;
  while (end < lines.length && !isBlank(lines[end]) && !startsBlock(lines[end])) end += 1;
  return [{ kind: "paragraph", text: lines.slice(at, end).map((line) => line.trim()).join("\n") }, end];
}

function startsBlock(line) {
  return STARTS_BLOCK.some((pattern) => pattern.test(line));
}

function skipBlank(lines, at) {
  while (at < lines.length && isBlank(lines[at])) at += 1;
  return at;
}

/** `cite(n)` makes the marker of source n, or null where there is no such source. */
function renderBlock(block, cite) {
  switch (block.kind) {
    case "code": return el("pre", {}, el("code", {}, block.text));
    case "heading": return el("h3", {}, ...renderInline(block.text, cite));
    case "rule": return el("hr");
    case "quote": return el("blockquote", {}, ...block.blocks.map((inner) => renderBlock(inner, cite)));
    case "list": return renderList(block, cite);
    default: return el("p", {}, ...renderInline(block.text, cite));
  }
}

function renderList({ ordered, start, items }, cite) {
  const nodes = items.map((blocks) => el("li", {}, ...blocks.flatMap((block, i) =>
    i === 0 && block.kind === "paragraph" ? renderInline(block.text, cite) : [renderBlock(block, cite)])));
  return ordered ? el("ol", { start }, ...nodes) : el("ul", {}, ...nodes);
}

function renderInline(text, cite) {
  const nodes = [];
  let at = 0;
  for (const match of text.matchAll(INLINE)) {
    nodes.push(text.slice(at, match.index), renderSpan(match, cite));
    at = match.index + match[0].length;
  }
  return [...nodes, text.slice(at)];
}

/** What makes no node stays as it was written. */
function renderSpan(match, cite) {
  const { code, strong, em, label, href, cited, url } = match.groups;
  if (code) return el("code", {}, code);
  if (strong) return el("strong", {}, ...renderInline(strong, cite));
  if (em) return el("em", {}, ...renderInline(em, cite));
  if (cited) return cite(Number(cited)) ?? match[0];
  return link(href ?? url, label ?? url) ?? match[0];
}

// ----------------------------------------------------------------------------------------- answer status

/** All that is known of an answer; `absorb` adds a chunk of the stream to it. */
function emptyResult() {
  return { text: "", rag: {}, usage: null, finishReason: null, startedAt: performance.now(), elapsedMs: 0 };
}

function absorb(result, chunk) {
  const choice = chunk.choices?.[0];
  result.text += choice?.delta?.content ?? "";
  result.finishReason = choice?.finish_reason ?? result.finishReason;
  result.usage = chunk.usage ?? result.usage;
  Object.assign(result.rag, chunk.rag);
  result.elapsedMs = performance.now() - result.startedAt;
}

/** The server's time where it told us: ours holds the network too. */
function totalMs({ rag, elapsedMs }) {
  return rag.timings_ms?.total ?? elapsedMs;
}

function summaryText(result) {
  const made = GROUNDING[result.rag.grounded] ?? "Not checked against the sources";
  const tokens = result.usage && plural(result.usage.total_tokens, "token");
  return [made, duration(totalMs(result)), tokens].filter(Boolean).join(" · ");
}

function warnings({ rag, finishReason }) {
  const reasons = (rag.degraded ?? []).map((code) => DEGRADED[code] ?? spoken(code));
  return [
    reasons.length && `Degraded: ${reasons.join("; ")}.`,
    finishReason === "length" && "The answer is cut off: it reached the length limit.",
    rag.removed_markers && `Removed ${plural(rag.removed_markers, "citation")} of a source that does not exist.`,
  ].filter(Boolean);
}

/** The sentences that the check did not find in the sources, to read for oneself. */
function unsupportedList(sentences = []) {
  if (!sentences.length) return null;
  return el("details", { class: "warning" },
    el("summary", {}, `${plural(sentences.length, "sentence")} without support in the sources`),
    el("ul", {}, ...sentences.map((sentence) => el("li", {}, sentence))));
}

/** Filters that were read from the question, as one text. */
function named(filters = {}) {
  return Object.entries(filters).map(([field, value]) => `${field} ${[value].flat().join(" or ")}`).join(" and ");
}

/** The numbers behind an answer, for whoever wants to know where the time went. */
function trace({ rag, usage }) {
  const stages = Object.entries(rag.timings_ms ?? {});
  const rows = [
    ["Searched for", rag.rewritten_query],
    ["Only documents with", named(rag.recognised_filters)],
    ["Time", stages.map(([stage, ms]) => `${spoken(stage)} ${duration(ms)}`).join(", ")],
    ["Tokens", usage && `${number(usage.prompt_tokens)} read, ${number(usage.completion_tokens)} written`],
    ["Request", rag.request_id],
  ].filter(([, value]) => value);
  if (!rows.length) return null;
  return el("details", { class: "trace" },
    el("summary", {}, "Details"),
    el("dl", {}, ...rows.flatMap(([name, value]) => [el("dt", {}, name), el("dd", {}, value)])));
}

function showProgress(turn, text) {
  turn.view.status.replaceChildren(el("p", { class: "summary", "data-state": "running" }, text));
}

function showFinished(turn) {
  const { result } = turn;
  const summary = summaryText(result);
  turn.view.status.replaceChildren(...[
    el("p", { class: "summary", "data-state": result.rag.grounded ?? "unchecked" }, summary),
    ...warnings(result).map((text) => el("p", { class: "warning" }, text)),
    unsupportedList(result.rag.unsupported),
    trace(result),
  ].filter(Boolean));
  announce(`Answer complete. ${summary}`);
}

/** An answer that ended early was not checked as a whole: the status says that and claims nothing else. */
function showInterrupted(turn, text) {
  turn.view.status.replaceChildren(el("p", { class: "summary", "data-state": "unchecked" }, text));
  announce(text);
}

// ----------------------------------------------------------------------------------------------- sources

function sourceId(turn, n) {
  return `${turn.id}-source-${n}`;
}

/** A link, not a button: a button lets the line break between it and the word that it belongs to. */
function marker(turn, n) {
  const source = turn.result.rag.sources?.find((candidate) => candidate.n === n);
  if (!source) return null;
  const label = `Source ${n}: ${source.title || "Untitled"}`;
  const href = `#${sourceId(turn, n)}`;
  return el("a", { class: "marker", href, "data-n": n, title: label, "aria-label": label }, String(n));
}

function sourceCard(turn, source) {
  const text = el("p", { class: "passage", dir: "auto" }, source.text);
  const onclick = () => toggleText(text, toggle);
  const toggle = button("Show all", { class: "toggle", "aria-expanded": "false", hidden: "", onclick });
  overflowObserver.observe(text);
  // Focusable by script: a marker moves the focus here, and the focus is the highlight.
  return el("li", { class: "source-card", id: sourceId(turn, source.n), "data-n": source.n, tabindex: "-1" },
    el("span", { class: "number" }, String(source.n)),
    el("div", { class: "source" },
      el("p", { class: "title", dir: "auto" }, linkedTitle(source)),
      el("p", { class: "small" }, byline(source.metadata)),
      text,
      toggle));
}

function toggleText(text, toggle) {
  const expanded = text.classList.toggle("expanded");
  toggle.setAttribute("aria-expanded", String(expanded));
  toggle.textContent = expanded ? "Show less" : "Show all";
}

/** Whether a passage is cut depends on the width, and is unknown while its card is folded away. */
const overflowObserver = new ResizeObserver((entries) => {
  for (const { target } of entries) {
    const fits = !target.classList.contains("expanded") && target.scrollHeight <= target.clientHeight;
    target.nextElementSibling.hidden = fits;
  }
});

function showSources(turn) {
  const { sources = [] } = turn.result.rag;
  if (!sources.length || turn.view.cards.size) return;
  for (const source of sources) turn.view.cards.set(source.n, sourceCard(turn, source));
  arrangeSources(turn, new Set());
}

/** Cited cards in the open, the others folded. The cards move, so one that was opened while streaming stays open. */
function arrangeSources(turn, cited) {
  const cards = [...turn.view.cards].sort(([a], [b]) => a - b);
  const used = cards.filter(([n]) => cited.has(n)).map(([, card]) => card);
  const rest = cards.filter(([n]) => !cited.has(n)).map(([, card]) => card);
  for (const card of used) card.classList.add("cited");
  const wasOpen = turn.view.sources.querySelector("details")?.open;
  turn.view.sources.replaceChildren(...[
    used.length && el("h3", {}, used.length === 1 ? "Source" : "Sources"),
    used.length && el("ol", { class: "cards" }, ...used),
    rest.length && el("details", { class: "retrieved", open: wasOpen ? "" : undefined },
      el("summary", {}, used.length ? `Also retrieved, not cited (${rest.length})` : `Retrieved (${rest.length})`),
      el("ol", { class: "cards" }, ...rest)),
  ].filter(Boolean));
}

/** The server says what is cited; an answer that ended early has only its markers. */
function citedNumbers({ text, rag }) {
  return new Set(rag.cited ?? Array.from(text.matchAll(/\[(\d{1,3})\]/g), ([, n]) => Number(n)));
}

function revealSource(turn, n) {
  const card = turn.view.cards.get(n);
  const folded = card.closest("details");
  if (folded) folded.open = true;
  card.focus({ preventScroll: true });
  const calm = matchMedia("(prefers-reduced-motion: reduce)").matches;
  card.scrollIntoView({ block: "nearest", behavior: calm ? "auto" : "smooth" });
}

// ------------------------------------------------------------------------------------------ conversation

/** `turns` in order; `running` is the AbortController of the answer that streams in, or null. */
const conversation = { turns: [], running: null };
let turnCount = 0;

function createTurn(question) {
  turnCount += 1;
  const view = {
    body: el("div", { class: "body", dir: "auto" }),
    status: el("div", { class: "status" }),
    sources: el("div", { class: "sources" }),
    cards: new Map(),
  };
  view.answer = el("article", { class: "answer", "aria-label": "Answer" }, view.body, view.status, view.sources);
  view.turn = el("section", { class: "turn" }, el("h2", { class: "asked", dir: "auto" }, question), view.answer);
  const turn = { id: `turn-${turnCount}`, question, view, result: emptyResult(), answered: false };
  view.body.addEventListener("click", (event) => followMarker(event, turn));
  return turn;
}

function followMarker(event, turn) {
  const clicked = event.target.closest(".marker");
  if (!clicked) return;
  event.preventDefault(); // Else each look at a source is a step in the browser's history.
  revealSource(turn, Number(clicked.dataset.n));
}

/** The questions that got an answer before this turn, each with its answer. */
function messagesFor(turn) {
  const before = conversation.turns.slice(0, conversation.turns.indexOf(turn));
  const history = before.filter(({ answered }) => answered).flatMap(({ question, result }) => [
    { role: "user", content: question },
    { role: "assistant", content: result.text },
  ]);
  return [...history, { role: "user", content: turn.question }];
}

function ask(question) {
  const turn = createTurn(question);
  conversation.turns.push(turn);
  // Only the last question can be tried again: a later one may build on those before it.
  document.querySelectorAll("#conversation .retry").forEach((each) => each.remove());
  byId("conversation").append(turn.view.turn);
  showPage();
  leaveField();
  run(turn);
  scrollToEnd();
}

function retry(turn) {
  turn.result = emptyResult();
  turn.view.cards.clear();
  turn.view.answer.querySelector(".error").remove();
  turn.view.body.replaceChildren();
  turn.view.sources.replaceChildren();
  leaveField();
  run(turn);
}

async function run(turn) {
  const controller = new AbortController();
  setRunning(controller);
  turn.view.answer.setAttribute("aria-busy", "true");
  showProgress(turn, "Searching the documents");
  announce("Searching the documents");
  try {
    for await (const chunk of completionChunks(messagesFor(turn), controller.signal)) {
      absorb(turn.result, chunk);
      scheduleDraw(turn);
    }
    finish(turn);
  } catch (error) {
    if (conversation.running !== controller) return; // A new conversation has taken over.
    if (error.name === "AbortError") stopped(turn);
    else failed(turn, error);
  }
  turn.view.answer.removeAttribute("aria-busy");
  setRunning(null);
}

function finish(turn) {
  turn.answered = true;
  drawFinal(turn);
  showFinished(turn);
}

/** What was written until the stop stays, also for the questions that follow. */
function stopped(turn) {
  turn.answered = turn.result.text !== "";
  drawFinal(turn);
  showInterrupted(turn, turn.answered ? "Stopped. What is here was not checked." : "Stopped before an answer came.");
}

function failed(turn, error) {
  if (!(error instanceof RequestError)) console.error(error);
  const following = isAtEnd();
  drawFinal(turn);
  if (turn.result.text) showInterrupted(turn, "The answer is incomplete and was not checked.");
  else turn.view.status.replaceChildren();
  turn.view.body.after(errorBox(error, () => retry(turn)));
  if (following) scrollToEnd();
}

/** Draw at most once a frame: tokens come faster than that, and nobody reads faster. */
function scheduleDraw(turn) {
  if (turn.frame) return;
  turn.frame = requestAnimationFrame(() => {
    turn.frame = null;
    const following = isAtEnd();
    drawProgress(turn);
    if (following) scrollToEnd();
  });
}

function drawProgress(turn) {
  const { text, rag } = turn.result;
  showSources(turn);
  const found = plural(rag.sources?.length ?? 0, "passage");
  showProgress(turn, text ? "Answering" : `${found} found, waiting for the answer`);
  // A marker that has half arrived would flash up as text.
  drawBody(turn, text.replace(/\[\d*$/, ""));
}

function drawFinal(turn) {
  cancelAnimationFrame(turn.frame);
  turn.frame = null;
  showSources(turn);
  drawBody(turn, turn.result.text);
  arrangeSources(turn, citedNumbers(turn.result));
}

function drawBody(turn, text) {
  const blocks = parseBlocks(text.split("\n"));
  patch(turn.view.body, blocks.map((block) => renderBlock(block, (n) => marker(turn, n))));
}

/** Change only what differs: a selection, or the focus on a marker, survives the rest streaming in. */
function patch(parent, fresh) {
  const old = [...parent.childNodes];
  fresh.forEach((node, i) => {
    if (i >= old.length) parent.append(node);
    else if (!old[i].isEqualNode(node)) patchNode(old[i], node);
  });
  old.slice(fresh.length).forEach((node) => node.remove());
}

function patchNode(old, fresh) {
  const isSameTag = old.cloneNode(false).isEqualNode(fresh.cloneNode(false));
  if (old instanceof Element && isSameTag) patch(old, [...fresh.childNodes]);
  else if (old instanceof Text && fresh instanceof Text && fresh.data.startsWith(old.data)) {
    old.appendData(fresh.data.slice(old.data.length));
  } else old.replaceWith(fresh);
}

function isAtEnd() {
  return document.documentElement.scrollHeight - innerHeight - scrollY < 60;
}

function scrollToEnd() {
  scrollTo(0, document.documentElement.scrollHeight);
}

function setRunning(controller) {
  conversation.running = controller;
  byId("send").hidden = Boolean(controller);
  byId("stop").hidden = !controller;
}

function showPage() {
  const isEmpty = conversation.turns.length === 0;
  byId("welcome").hidden = !isEmpty;
  byId("new-conversation").hidden = isEmpty;
}

function startOver() {
  conversation.running?.abort();
  setRunning(null);
  conversation.turns = [];
  byId("conversation").replaceChildren();
  announce("New conversation");
  showPage();
  byId("question").focus();
}

function submitQuestion() {
  const field = byId("question");
  const question = field.value.trim();
  if (!question || conversation.running) return;
  field.value = "";
  ask(question);
}

/** Ready for the next question; but on a touch screen the focus would hold the keyboard up, over the answer. */
function leaveField() {
  if (matchMedia("(pointer: coarse)").matches) byId("question").blur();
  else byId("question").focus();
}

function sendOnEnter(event) {
  // Enter also picks a suggestion of an input method: that is not the end of the question.
  if (event.key !== "Enter" || event.shiftKey || event.isComposing) return;
  event.preventDefault();
  submitQuestion();
}

// --------------------------------------------------------------------------------------------- documents

const library = { total: 0, lastId: null };

function setTotal(total) {
  library.total = total;
  byId("document-count").textContent = number(total);
  byId("documents-total").textContent = plural(total, "document");
  byId("no-documents").hidden = total > 0;
}

function fetchDocuments(limit, after) {
  const query = new URLSearchParams({ limit, ...(after && { after }) });
  return requestJson(`/v1/documents?${query}`);
}

/** The first page of documents, or the next one after those that are shown. */
async function loadDocuments({ more = false } = {}) {
  const notice = byId("documents-notice");
  const list = byId("document-list");
  try {
    const page = await fetchDocuments(DOCUMENTS_PER_PAGE, more ? library.lastId : null);
    notice.replaceChildren();
    if (!more) list.replaceChildren();
    list.append(...page.data.map(documentRow));
    library.lastId = page.data.at(-1)?.id ?? library.lastId;
    byId("more-documents").hidden = !page.has_more;
    setTotal(page.total);
  } catch (error) {
    notice.replaceChildren(errorBox(error, () => loadDocuments({ more })));
  }
}

function documentRow(item) {
  const added = new Date(item.ingested_at * 1000).toLocaleDateString(undefined, { dateStyle: "medium" });
  const size = `${plural(item.num_characters, "character")} · ${plural(item.num_chunks, "chunk")}`;
  const row = el("li", { class: "document-row", "data-id": item.id },
    el("div", {},
      el("p", { class: "title", dir: "auto" }, linkedTitle(item)),
      el("p", { class: "small" }, [byline(item.metadata), size, `added ${added}`].filter(Boolean).join(" · "))),
    el("div", { class: "actions" }));
  offerDelete(row, item);
  return row;
}

function offerDelete(row, item) {
  const label = { class: "quiet delete", "aria-label": `Delete ${item.title}` };
  row.querySelector(".actions").replaceChildren(
    button("Delete", { ...label, onclick: () => confirmDelete(row, item) }));
}

/** In the row itself, so that it stays in sight what is about to go. */
function confirmDelete(row, item) {
  const keep = () => {
    offerDelete(row, item);
    row.querySelector(".delete").focus();
  };
  row.querySelector(".actions").replaceChildren(
    button("Delete for good", { class: "danger confirm-delete", onclick: () => deleteDocument(row, item) }),
    button("Keep", { class: "quiet keep", onclick: keep }));
  row.querySelector(".keep").focus();
}

async function deleteDocument(row, item) {
  row.querySelectorAll("button").forEach((each) => { each.disabled = true; });
  try {
    await request(`/v1/documents/${encodeURIComponent(item.id)}`, { method: "DELETE" });
  } catch (error) {
    offerDelete(row, item);
    byId("documents-notice").replaceChildren(errorBox(error));
    return;
  }
  const neighbour = row.nextElementSibling ?? row.previousElementSibling;
  row.remove();
  setTotal(library.total - 1);
  (neighbour?.querySelector("button") ?? byId("file-input")).focus();
}

/** One request for each file: the results come as they are there, and a file too large fails alone. */
async function upload(files) {
  byId("upload-results").replaceChildren();
  for (const file of files) {
    const line = el("li", {}, `${file.name}: uploading`);
    byId("upload-results").append(line);
    const { text, ok } = await uploadOne(file);
    line.replaceWith(el("li", { class: ok ? "done" : "failed" }, `${file.name}: ${text}`));
  }
  await loadDocuments();
}

async function uploadOne(file) {
  try {
    await file.slice(0, 1).arrayBuffer(); // A dropped folder is a file that cannot be read.
  } catch {
    return { ok: false, text: "failed: cannot be read. If it is a folder, drop the files in it." };
  }
  const form = new FormData();
  form.append("files", file);
  try {
    const { data } = await requestJson("/v1/documents", { method: "POST", body: form });
    return describeReceipts(data);
  } catch (error) {
    return { ok: false, text: `failed: ${error.message}` };
  }
}

/** "created, 3 chunks", or for a file that holds several documents "12 created, 1 failed: no text". */
function describeReceipts(receipts) {
  const reasons = new Set(receipts.map(({ error }) => error).filter(Boolean));
  const why = reasons.size ? `: ${[...reasons].join("; ")}` : "";
  const ok = receipts.every(({ status }) => status !== "failed");
  if (receipts.length === 1) {
    const [{ status, num_chunks: chunks }] = receipts;
    return { ok, text: ok ? `${status}, ${plural(chunks, "chunk")}` : status + why };
  }
  const counts = ["created", "updated", "unchanged", "failed"]
    .map((status) => [receipts.filter((receipt) => receipt.status === status).length, status])
    .filter(([count]) => count);
  return { ok, text: counts.map((pair) => pair.join(" ")).join(", ") + why };
}

function chooseFiles(event) {
  const files = [...event.target.files];
  event.target.value = ""; // Else choosing the same file again is no change.
  upload(files);
}

function dropFiles(event) {
  event.preventDefault();
  markDropZone(false);
  const files = [...event.dataTransfer.files];
  if (files.length) upload(files);
}

function markDropZone(isOver) {
  byId("drop-zone").classList.toggle("over", isOver);
}

function openDocuments() {
  byId("upload-results").replaceChildren();
  byId("documents-dialog").showModal();
  loadDocuments();
}

// ------------------------------------------------------------------------------------------------- start

function showExamples() {
  const offer = (question) => el("li", {}, button(question, { onclick: () => ask(question) }));
  byId("examples").append(...EXAMPLES.map(offer));
}

/** What is behind the page. It is an extra: when the server is away, the first question will say so. */
async function showService() {
  const [models, documents] = await Promise.allSettled([requestJson("/v1/models"), fetchDocuments(1)]);
  if (documents.value) setTotal(documents.value.total);
  const served = models.value?.data ?? [];
  const description = served.find(({ id }) => id === MODEL)?.description;
  const others = served.filter((model) => model.owned_by !== MODEL).map(({ id }) => id);
  const engine = others.length && `Language model: ${others.join(", ")}.`;
  byId("service").textContent = [description, engine].filter(Boolean).join(" ");
}

function listen() {
  byId("composer").addEventListener("submit", (event) => {
    event.preventDefault();
    submitQuestion();
  });
  byId("question").addEventListener("keydown", sendOnEnter);
  byId("stop").addEventListener("click", () => {
    conversation.running?.abort();
    byId("question").focus();
  });
  byId("new-conversation").addEventListener("click", startOver);
  byId("open-documents").addEventListener("click", openDocuments);
  byId("more-documents").addEventListener("click", () => loadDocuments({ more: true }));
  byId("file-input").addEventListener("change", chooseFiles);

  const dialog = byId("documents-dialog");
  dialog.addEventListener("dragover", () => markDropZone(true));
  dialog.addEventListener("dragleave", () => markDropZone(false));
  dialog.addEventListener("drop", dropFiles);
  // A file that misses the dialog would open in place of the page, and the conversation would be gone.
  for (const type of ["dragover", "drop"]) document.addEventListener(type, (event) => event.preventDefault());
}

listen();
showExamples();
showService();
