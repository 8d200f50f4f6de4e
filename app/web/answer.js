/** An answer as data: what has come of it so far, and what follows from that. No node is made here. */

/** What is known before anything has come; `absorb` adds a chunk of the stream. */
export function emptyAnswer() {
  return { text: "", rag: {}, usage: null, finishReason: null, startedAt: performance.now(), elapsedMs: 0 };
}

export function absorb(answer, chunk) {
  const choice = chunk.choices?.[0];
  // A refusal may come as text of its own kind; for the reader it is the answer.
  answer.text += choice?.delta?.content ?? choice?.delta?.refusal ?? "";
  answer.finishReason = choice?.finish_reason ?? answer.finishReason;
  answer.usage = chunk.usage ?? answer.usage;
  Object.assign(answer.rag, chunk.rag);
  answer.elapsedMs = performance.now() - answer.startedAt;
}

/** The server's time where it told us: ours holds the network too. */
export function totalMs({ rag, elapsedMs }) {
  return rag.timings_ms?.total ?? elapsedMs;
}

/** The server says what is cited; an answer that ended early has only its markers. */
export function citedNumbers({ text, rag }) {
  return new Set(rag.cited ?? Array.from(text.matchAll(/\[(\d{1,3})\]/g), ([, n]) => Number(n)));
}

/** The text as far as it can be shown while it streams in: a marker that has half arrived would flash up as text. */
export function shownText({ text }) {
  return text.replace(/ ?\[\d*$/, "");
}
