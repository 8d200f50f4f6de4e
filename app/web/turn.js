/** A question with its answer: asked, streamed in, finished, stopped or failed, and asked again. */

import { absorb, citedNumbers, emptyAnswer, shownText } from "./answer.js";
import { completionChunks } from "./api.js";
import { announce, button, byId, el, errorBox, patch, present } from "./dom.js";
import { RequestError } from "./http.js";
import { renderMarkdown } from "./markdown.js";
import { Sources } from "./sources.js";
import { finishedStatus, interruptedStatus, runningStatus, summaryText } from "./status.js";
import { textWithoutMarkers } from "./support.js";
import { describeFilters, plural } from "./words.js";

const SPACE_BELOW = 16;
let numTurns = 0;

/** `history` gives the messages before this one, `filters` are those that the reader chose for it. */
export class Turn {
  constructor({ question, filters, history, onRetry }) {
    numTurns += 1;
    this.question = question;
    this.filters = filters;
    this.history = history;
    this.onRetry = onRetry;
    this.recognisesFilters = true;
    this.answer = emptyAnswer();
    this.isAnswered = false;
    this.stopping = null;
    this.frame = null;
    this.build(numTurns);
  }

  /** What the conversation remembers of this turn. */
  get messages() {
    if (!this.isAnswered) return [];
    return [{ role: "user", content: this.question }, { role: "assistant", content: this.answer.text }];
  }

  /** Ask, and show what comes until the end; resolves when nothing more will come. */
  async run() {
    this.stopping = new AbortController();
    this.view.answer.setAttribute("aria-busy", "true");
    this.showProgress("Searching the documents");
    announce("Searching the documents");
    try {
      for await (const chunk of completionChunks(this.body(), this.stopping.signal)) {
        absorb(this.answer, chunk);
        this.scheduleDraw();
      }
      this.finish();
    } catch (error) {
      if (error.name === "AbortError") this.stopped();
      else this.failed(error);
    }
    this.view.answer.removeAttribute("aria-busy");
  }

  stop() {
    this.stopping?.abort();
  }

  /** Empty what the last run has left, so that it can be run again. */
  reset() {
    this.answer = emptyAnswer();
    this.isAnswered = false;
    this.sources.clear();
    for (const part of ["scope", "body", "status", "actions"]) this.view[part].replaceChildren();
  }

  /** Only the last turn can be asked again: a later one may build on those before it. */
  settle() {
    for (const button of this.node.querySelectorAll(".actions button, .scope button")) button.remove();
  }

  build(number) {
    this.view = {
      scope: el("div", { class: "scope" }),
      body: el("div", { class: "body", dir: "auto" }),
      status: el("div", { class: "status" }),
      actions: el("div", { class: "actions" }),
    };
    this.sources = new Sources(number, this.view.body);
    this.view.answer = el("article", { class: "answer", "aria-label": "Answer" },
      this.view.scope, this.view.body, this.view.status, this.view.actions);
    this.node = el("section", { class: "turn" },
      el("h2", { class: "asked", dir: "auto" }, this.question),
      this.view.answer,
      this.sources.node);
  }

  body() {
    const rag = { filters: this.filters, ...(!this.recognisesFilters && { recognise_filters: false }) };
    return { messages: [...this.history(), { role: "user", content: this.question }], rag };
  }

  /** Draw at most once a frame: tokens come faster than that, and nobody reads faster. */
  scheduleDraw() {
    this.frame ??= requestAnimationFrame(() => {
      this.frame = null;
      this.keepingEndInView(() => this.drawProgress());
    });
  }

  /** Follow the answer as it grows, but only for a reader who sees its end; and never on to the sources below it. */
  keepingEndInView(change) {
    const wasInView = hiddenHeight(this.view.answer) < 4 * SPACE_BELOW;
    change();
    if (wasInView) scrollBy(0, Math.max(0, hiddenHeight(this.view.answer)));
  }

  drawProgress() {
    const { text, rag } = this.answer;
    this.sources.show(rag.sources);
    this.showScope();
    const found = plural(rag.sources?.length ?? 0, "passage");
    this.showProgress(text ? "Answering" : `${found} found, waiting for the answer`);
    this.drawBody(shownText(this.answer));
  }

  drawFinal() {
    cancelAnimationFrame(this.frame);
    this.frame = null;
    const { rag } = this.answer;
    this.sources.show(rag.sources);
    this.showScope({ isFinal: true });
    this.drawBody(this.answer.text);
    this.sources.finish({ cited: citedNumbers(this.answer), isRefused: rag.grounded === "refused" });
  }

  drawBody(text) {
    patch(this.view.body, renderMarkdown(text, { cite: (n) => this.sources.marker(n) }));
  }

  finish() {
    this.isAnswered = true;
    this.keepingEndInView(() => {
      this.drawFinal();
      this.view.status.replaceChildren(...finishedStatus(this.answer, this.question));
      this.offerRetry("Ask again");
    });
    announce(`${textWithoutMarkers(this.view.body)} ${summaryText(this.answer)}`);
  }

  /** What was written until the stop stays, also for the questions that follow. */
  stopped() {
    this.isAnswered = this.answer.text !== "";
    const text = this.isAnswered ? "Stopped. What is here was not checked." : "Stopped before an answer came.";
    this.keepingEndInView(() => this.interrupt(text));
  }

  failed(error) {
    if (!(error instanceof RequestError)) console.error(error);
    this.keepingEndInView(() => {
      this.interrupt(this.answer.text ? "The answer is incomplete and was not checked." : "Not answered");
      this.view.actions.replaceChildren(errorBox(error, () => this.onRetry(this)));
    });
  }

  interrupt(text) {
    this.drawFinal();
    this.view.status.replaceChildren(interruptedStatus(text));
    this.offerRetry("Try again");
    announce(text);
  }

  offerRetry(label) {
    this.view.actions.replaceChildren(button(label, { class: "quiet retry", onclick: () => this.onRetry(this) }));
  }

  showProgress(text) {
    patch(this.view.status, [runningStatus(text)]);
  }

  /** Which documents were searched, when not all: the reader's choice, and what the question itself names. */
  showScope({ isFinal = false } = {}) {
    const note = (...parts) => el("p", { class: "small", dir: "auto" }, "Searched only documents with ", ...parts);
    const chosen = describeFilters(this.filters);
    const recognised = describeFilters(this.answer.rag.recognised_filters);
    patch(this.view.scope, present([
      chosen && note(`${chosen}.`),
      recognised && note(`${recognised}, as the question names. `,
        isFinal && button("Search all", { class: "toggle", onclick: () => this.searchAll() })),
    ]));
  }

  searchAll() {
    this.recognisesFilters = false;
    this.onRetry(this);
  }
}

/** How far the end of an answer stands below what can be seen of the page, in pixels. */
function hiddenHeight(answer) {
  const edge = Math.min(byId("composer").getBoundingClientRect().top, innerHeight);
  return answer.getBoundingClientRect().bottom + SPACE_BELOW - edge;
}
