/** The chat page of Cleave: puts its parts to work. */

import { fetchDocuments, fetchFacets, fetchModels } from "./api.js";
import { ask, startOver, stop } from "./conversation.js";
import { listenForDocuments, setTotal } from "./documents.js";
import { button, byId, el } from "./dom.js";
import { listenForFilters } from "./filters.js";
import { listenForReader } from "./reader.js";
import { listenForFiles } from "./uploads.js";

/** Questions that the sample documents answer; the last one names its author. Without her documents none is offered. */
const EXAMPLES = [
  "How long did the Reading Room outage on 14 October 2025 last?",
  "What did capping max_num_seqs at 64 do to Hedgerow's p95 time to first token?",
  "In Noor Hallivant's account, how many of the unanswerable questions did the 4-bit candidate answer?",
];
const SAMPLE_AUTHOR = "Noor Hallivant";

function submitQuestion() {
  const field = byId("question");
  if (ask(field.value.trim())) field.value = "";
}

function sendOnEnter(event) {
  // Enter also picks a suggestion of an input method: that is not the end of the question.
  if (event.key !== "Enter" || event.shiftKey || event.isComposing) return;
  event.preventDefault();
  submitQuestion();
}

function showExamples(facets) {
  if (!facets.some(({ values }) => values.some(({ value }) => value === SAMPLE_AUTHOR))) return;
  const offer = (question) => el("li", {}, button(question, { onclick: () => ask(question) }));
  byId("examples").append(...EXAMPLES.map(offer));
}

/** What is behind the page. It is an extra: when the server is away, the first question will say so. */
async function showService() {
  const requests = [fetchModels(), fetchDocuments({ limit: 1 }), fetchFacets()];
  const [models, documents, facets] = await Promise.allSettled(requests);
  if (documents.value) setTotal(documents.value.total);
  if (facets.value) showExamples(facets.value);
  if (!models.value) return;
  const { profile, others } = models.value;
  const engine = others.length ? `Language model: ${others.map(({ id }) => id).join(", ")}.`
    : "The language model is not available now: answers are quotes.";
  byId("service").textContent = [profile?.description, engine].filter(Boolean).join(" ");
}

byId("composer").addEventListener("submit", (event) => {
  event.preventDefault();
  submitQuestion();
});
byId("question").addEventListener("keydown", sendOnEnter);
byId("stop").addEventListener("click", stop);
byId("new-conversation").addEventListener("click", startOver);
// Escape stops an answer that is running; in a dialog it closes that.
document.addEventListener("keydown", (event) => {
  if (event.key === "Escape" && !document.querySelector("dialog[open]")) stop();
});
listenForFilters();
listenForDocuments();
listenForFiles();
listenForReader();
showService();
