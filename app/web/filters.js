/** Filters by author or another metadata field: a dialog to choose values, and what is chosen above the question. */

import { fetchFacets } from "./api.js";
import { button, byId, closeByClickBeside, el, errorBox, present } from "./dom.js";
import { number, spoken } from "./words.js";

/** A field with more values than this is folded. */
const MAX_OPEN_VALUES = 12;

/** Field to chosen values, in the order of choosing. Values keep their type: the year 2024 is not the text "2024". */
const chosen = new Map();

/** The filters as the API takes them. */
export function chosenFilters() {
  return Object.fromEntries(Array.from(chosen, ([field, values]) => [field, [...values]]));
}

export function listenForFilters() {
  byId("open-filters").addEventListener("click", openFilters);
  byId("clear-filters").addEventListener("click", clearFilters);
  closeByClickBeside(byId("filters-dialog"));
}

function openFilters() {
  byId("filters-dialog").showModal();
  loadFacets();
}

async function loadFacets() {
  const list = byId("facets");
  try {
    const facets = await fetchFacets();
    const nodes = facets.sort(byUsefulness).map(facetGroup);
    list.replaceChildren(...nodes.length ? nodes : [el("p", { class: "small" }, "The documents have no metadata.")]);
  } catch (error) {
    list.replaceChildren(errorBox(error, loadFacets));
  }
}

function clearFilters() {
  chosen.clear();
  for (const box of byId("facets").querySelectorAll("input")) box.checked = false;
  showChosen();
}

/** A field that groups the documents: few values, and some that several of them share. */
function isGrouping({ values, num_values: numValues }) {
  return numValues <= MAX_OPEN_VALUES && values.some(({ count }) => count > 1);
}

function byUsefulness(a, b) {
  return isGrouping(b) - isGrouping(a) || a.field.localeCompare(b.field);
}

function facetGroup(facet) {
  const { field, values, num_values: numValues } = facet;
  const hidden = numValues - values.length;
  return el("details", { class: "facet", open: isGrouping(facet) || chosen.has(field) },
    el("summary", {}, `${spoken(field)} `, el("span", { class: "small" }, number(numValues))),
    el("ul", { "aria-label": spoken(field) }, ...values.map((one) => facetValue(field, one)), ...present([
      hidden > 0 && el("li", { class: "small" }, `and ${number(hidden)} more with fewer documents`),
    ])));
}

function facetValue(field, { value, count }) {
  const box = el("input", { type: "checkbox", onchange: () => choose(field, value, box.checked) });
  box.checked = Boolean(chosen.get(field)?.has(value));
  return el("li", {}, el("label", {}, box, el("span", { dir: "auto" }, String(value)),
    el("span", { class: "small" }, number(count))));
}

function choose(field, value, isChosen) {
  const values = chosen.get(field) ?? new Set();
  if (isChosen) values.add(value);
  else values.delete(value);
  if (values.size) chosen.set(field, values);
  else chosen.delete(field);
  showChosen();
}

function showChosen() {
  const chips = Array.from(chosen, ([field, values]) => Array.from(values, (value) => chip(field, value))).flat();
  byId("chosen-filters").replaceChildren(...chips);
  byId("clear-filters").disabled = !chips.length;
}

function chip(field, value) {
  const onclick = () => {
    choose(field, value, false);
    (byId("chosen-filters").querySelector("button") ?? byId("question")).focus();
  };
  return el("li", {}, button(`${spoken(field)}: ${value}`, {
    class: "chip", "aria-label": `Remove the filter ${spoken(field)}: ${value}`, onclick,
  }));
}
