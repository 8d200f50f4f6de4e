/**
 * What an answer's citations rest on: for each marker the sentence of the source's passage that is nearest to the
 * statement before it. The server says which source is cited, not which of its sentences; so words are compared.
 */

import { el } from "./dom.js";

/** Blocks that hold text of their own, in the Markdown of an answer or a passage. */
const BLOCKS = "p, li, h3, pre, td, th, blockquote";
const STEM_LENGTH = 6;
const MIN_COVERAGE = 0.3;

const intoSentences = new Intl.Segmenter(undefined, { granularity: "sentence" });
const intoWords = new Intl.Segmenter(undefined, { granularity: "word" });

/** What a marker stands behind: a quotation that ends there, else the last sentence before it. */
export function statementBefore(marker) {
  const range = document.createRange();
  range.setStart(marker.closest(BLOCKS) ?? marker.parentNode, 0);
  range.setEndBefore(marker);
  const text = textWithoutMarkers(range.cloneContents()).trim();
  const quoted = /“([^“”]+)”[\s.]*$/.exec(text);
  return quoted ? quoted[1] : sentencesOf(text).at(-1)?.text ?? "";
}

/** What a part of an answer says: a marker's number behind another one would be read as one number. */
export function textWithoutMarkers(part) {
  const copy = part.cloneNode(true);
  copy.querySelectorAll(".marker").forEach((marker) => marker.remove());
  return copy.textContent;
}

/** Where in a passage the sentence stands that is nearest to a statement: `{ block, start, end }`, or null. */
export function findSupport(passage, statement) {
  const candidates = leafBlocks(passage).flatMap((block) => {
    const text = block.textContent;
    const at = statement ? text.indexOf(statement) : -1;
    if (at >= 0) return [{ block, start: at, end: at + statement.length, text: statement }];
    return sentencesOf(text).map((sentence) => ({ block, ...sentence }));
  });
  const best = nearest(statement, candidates.map(({ text }) => text));
  return best === null ? null : candidates[best];
}

/** Wrap a stretch of a block's text in `mark` elements, one per text node that it runs through. */
export function mark({ block, start, end }, attributes) {
  const nodes = [];
  const walker = document.createTreeWalker(block, NodeFilter.SHOW_TEXT);
  while (walker.nextNode()) nodes.push(walker.currentNode);
  let position = 0;
  for (const node of nodes) {
    const from = Math.max(start - position, 0);
    const to = Math.min(end - position, node.length);
    position += node.length;
    if (from >= to) continue;
    const marked = node.splitText(from);
    marked.splitText(to - from);
    const around = el("mark", attributes);
    marked.replaceWith(around);
    around.append(marked);
  }
}

/** The index of the sentence that shares most with a statement, null if none shares enough. Rare words count more. */
export function nearest(statement, sentences) {
  const wanted = stems(statement);
  const held = sentences.map(stems);
  const weight = (word) => 1 / held.filter((words) => words.has(word)).length;
  const shared = held.map((words) => [...wanted].filter((word) => words.has(word)));
  const scores = shared.map((words) => words.reduce((sum, word) => sum + weight(word), 0));
  const best = scores.indexOf(Math.max(...scores, 0));
  return best >= 0 && shared[best].length >= Math.max(1, MIN_COVERAGE * wanted.size) ? best : null;
}

/** Sentences with their place in the text, without the white space around them. */
function sentencesOf(text) {
  return Array.from(intoSentences.segment(text), ({ segment, index }) => {
    const start = index + segment.length - segment.trimStart().length;
    return { text: segment.trim(), start, end: start + segment.trim().length };
  }).filter(({ text }) => stems(text).size);
}

/** Words are compared by their first letters: enough to match inflections without a stemmer per language. */
function stems(text) {
  const words = Array.from(intoWords.segment(text)).filter(({ isWordLike }) => isWordLike);
  return new Set(words.map(({ segment }) => segment.toLocaleLowerCase().slice(0, STEM_LENGTH)));
}

function leafBlocks(passage) {
  return [...passage.querySelectorAll(BLOCKS)].filter((block) => !block.querySelector(BLOCKS));
}
