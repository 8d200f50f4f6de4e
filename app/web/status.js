/** How an answer came about, told under it: what was checked, what is missing, where the time went. */

import { totalMs } from "./answer.js";
import { el, present } from "./dom.js";
import { duration, number, plural, spoken } from "./words.js";

/** By the server's `grounded`. */
const GROUNDING = {
  model: "Written by the language model and checked against the sources",
  mixed: "Partly written by the language model and checked, partly quoted from the sources",
  quotes: "Quoted from the sources",
  refused: "Not answered",
  flagged: "Written by the language model; the sources do not support all of it",
  unchecked: "Written by the language model, not checked against the sources",
};

/** What an answer had to do without; a reason that is not listed is shown as the server names it. */
export const DEGRADED = {
  llm_unavailable: "The language model is not available.",
  llm_cold: "The language model is being started; the next answers will be its own.",
  overloaded: "The language model has too many requests.",
  llm_timeout: "The language model was too slow.",
  llm_failed: "The language model failed on the way.",
  history_trimmed: "The beginning of the conversation no longer fits into the prompt.",
  passages_dropped: "Not all passages fitted into the prompt.",
  rewriting_skipped: "The question was searched for as it stands, without what came before it.",
  reranking_skipped: "The passages could not be reranked in time.",
};

const REFUSED = {
  no_match: "No document matches the filters.",
  off_topic: "Nothing that was found is about this.",
  not_in_passages: "What was found comes near, but does not hold the answer.",
};

export function runningStatus(text) {
  return el("p", { class: "summary", "data-state": "running" }, text);
}

/** An answer that ended early was not checked as a whole: the status says that and claims nothing else. */
export function interruptedStatus(text) {
  return el("p", { class: "summary", "data-state": "unchecked" }, text);
}

export function finishedStatus(answer, question) {
  return present([
    el("p", { class: "summary", "data-state": answer.rag.grounded ?? "unchecked" }, summaryText(answer)),
    refusal(answer.rag.refusal),
    ...warnings(answer).map((text) => el("p", { class: "warning" }, text)),
    unsupportedList(answer.rag.unsupported),
    trace(answer, question),
  ]);
}

export function summaryText(answer) {
  const made = GROUNDING[answer.rag.grounded] ?? "Not checked against the sources";
  const numTokens = answer.usage?.total_tokens;
  return [made, duration(totalMs(answer)), numTokens > 0 && plural(numTokens, "token")].filter(Boolean).join(" · ");
}

function refusal(found) {
  if (!found) return null;
  // Of a near miss the answer itself says what is missing.
  const isTold = found.reason === "off_topic" && found.missing.length > 0;
  const missing = isTold ? ` No source mentions ${found.missing.join(", ")}.` : "";
  return el("p", { class: "refusal" }, (REFUSED[found.reason] ?? spoken(found.reason)) + missing);
}

function warnings({ rag, finishReason }) {
  const reasons = (rag.degraded ?? []).map((code) => DEGRADED[code] ?? `${spoken(code)}.`);
  return [
    reasons.length && `Degraded: ${reasons.join(" ")}`,
    finishReason === "length" && "The answer is cut off: it reached the length limit.",
    rag.removed_markers && `Removed ${plural(rag.removed_markers, "citation")} of a source that does not exist.`,
  ].filter(Boolean);
}

/** The sentences that the check did not find in the sources, to read for oneself. */
function unsupportedList(sentences = []) {
  if (!sentences.length) return null;
  return el("details", { class: "warning unsupported" },
    el("summary", {}, `${plural(sentences.length, "sentence")} of the model without support in the sources`),
    el("ul", {}, ...sentences.map((sentence) => el("li", {}, sentence))));
}

/** The numbers behind an answer, for whoever wants to know where the time went. */
function trace({ rag, usage }, question) {
  const rows = [
    ["Searched for", rag.rewritten_query !== question && rag.rewritten_query],
    ["Tokens", usage?.total_tokens > 0
      && `${number(usage.prompt_tokens)} read, ${number(usage.completion_tokens)} written`],
    ["Request", rag.request_id],
  ].filter(([, value]) => value);
  if (!rows.length && !rag.timings_ms) return null;
  return el("details", { class: "trace" },
    el("summary", {}, "Details"),
    rag.timings_ms && timings(rag.timings_ms),
    el("dl", {}, ...rows.flatMap(([name, value]) => [el("dt", {}, name), el("dd", { dir: "auto" }, value)])));
}

/** A bar per stage, as long as its share of the whole. `first_token` is counted from the start, as `total` is. */
function timings(stages) {
  const longest = Math.max(...Object.values(stages), 1);
  const row = ([stage, ms]) => {
    const bar = el("span", { class: "bar-of-time" });
    bar.style.width = `${100 * ms / longest}%`;
    const depth = stage.split(".").length - 1;
    return el("tr", { "data-stage": stage },
      el("th", { scope: "row", class: depth > 0 && "part" }, spoken(stage.split(".").at(-1))),
      el("td", { class: "share", "aria-hidden": "true" }, bar),
      el("td", { class: "time" }, duration(ms)));
  };
  return el("table", { class: "timings" },
    el("caption", {}, "Where the time went"),
    el("tbody", {}, ...Object.entries(stages).map(row)));
}
