/** The conversation: its turns in order, the one that is running, and what may be asked meanwhile (nothing). */

import { announce, byId } from "./dom.js";
import { chosenFilters } from "./filters.js";
import { Turn } from "./turn.js";

let turns = [];
let running = null;

/** Ask a question as the next turn; it is ignored while an answer is running. */
export function ask(question) {
  if (running || !question) return false;
  const turn = new Turn({ question, filters: chosenFilters(), history: () => messagesBefore(turn), onRetry: retry });
  turns.at(-1)?.settle();
  turns.push(turn);
  byId("conversation").append(turn.node);
  showPage();
  start(turn);
  turn.node.scrollIntoView();
  return true;
}

export function stop() {
  if (!running) return;
  running.stop();
  byId("question").focus();
}

export function startOver() {
  running?.stop();
  setRunning(null);
  turns = [];
  byId("conversation").replaceChildren();
  announce("New conversation");
  showPage();
  byId("question").focus();
}

function retry(turn) {
  if (running) return;
  turn.reset();
  start(turn);
}

async function start(turn) {
  setRunning(turn);
  prepareField();
  await turn.run();
  if (running === turn) setRunning(null); // Else a new conversation has taken over.
}

function messagesBefore(turn) {
  return turns.slice(0, turns.indexOf(turn)).flatMap(({ messages }) => messages);
}

function setRunning(turn) {
  running = turn;
  byId("send").hidden = Boolean(turn);
  byId("stop").hidden = !turn;
}

function showPage() {
  const isEmpty = turns.length === 0;
  byId("welcome").hidden = !isEmpty;
  byId("new-conversation").hidden = isEmpty;
}

/** Ready for the next question; but on a touch screen the focus would hold the keyboard up, over the answer. */
function prepareField() {
  if (matchMedia("(pointer: coarse)").matches) byId("question").blur();
  else byId("question").focus();
}
