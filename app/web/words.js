/** Numbers, names and dates as a reader expects them. */

export function number(value) {
  return value.toLocaleString();
}

export function plural(count, noun) {
  return `${number(count)} ${noun}${count === 1 ? "" : "s"}`;
}

export function duration(ms) {
  return ms < 1000 ? `${Math.round(ms)} ms` : `${(ms / 1000).toFixed(1)} s`;
}

export function fileSize(bytes) {
  const units = ["byte", "kilobyte", "megabyte", "gigabyte"];
  const power = Math.min(Math.floor(Math.log10(Math.max(bytes, 1)) / 3), units.length - 1);
  const format = { style: "unit", unit: units[power], unitDisplay: power ? "short" : "long", maximumFractionDigits: 1 };
  return (bytes / 1000 ** power).toLocaleString(undefined, format);
}

/** A name of the API in words. */
export function spoken(name) {
  return name.replaceAll("_", " ");
}

/** What a document is called. */
export function titleOf({ title, id }) {
  return title || id;
}

/** "author · platform · date", as far as they are known. */
export function byline(metadata = {}) {
  return [metadata.author, metadata.platform, metadata.date && writtenDate(metadata.date)].filter(Boolean).join(" · ");
}

/** A date as it is written where the reader is; what is no date stays as it stands. */
function writtenDate(value) {
  const date = new Date(value);
  if (!/^\d{4}-\d\d-\d\d/.test(value) || Number.isNaN(date.getTime())) return value;
  return date.toLocaleDateString(undefined, { dateStyle: "medium", timeZone: "UTC" });
}

/** Filters as one text: "author Noor Hallivant or Marit Oldershaw and year 2024". */
export function describeFilters(filters = {}) {
  return Object.entries(filters).map(([field, values]) => `${spoken(field)} ${[values].flat().join(" or ")}`).join(" and ");
}
