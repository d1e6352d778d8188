// The list of features: search, sort, filters, and walking through it.

// Without a concept, features of a layer where others have one come after these, by their words.
const ORDERS = {
  clarity: { value: (f) => f.clarity || f.word_clarity - 1, show: (f) => (f.clarity ? f.clarity.toFixed(2) : "") },
  precision: { value: (f) => f.precision, show: (f) => (f.concept ? f.precision.toFixed(2) : "") },
  energy: { value: (f) => f.energy, show: (f) => percent(f.energy) },
  firing: { value: (f) => f.firing, show: (f) => percent(f.firing_share, 0) },
  strong: { value: (f) => f.strong, show: (f) => percent(f.strong_share) },
  index: { value: null, show: (f) => (f.clarity ? f.clarity.toFixed(2) : "") },
};
const FILTERS = {
  all: () => true,
  clear: (f) => f.clear,
  unclear: (f) => !f.clear && !f.dead,
  dead: (f) => f.dead,
};
const rows = new Map();
let shown = [];

function control(id) {
  return document.getElementById(id);
}

function startList() {
  const layers = [...LAYERS.keys()];
  control("layer").append(...layers.map((layer) => h("option", { value: layer }, `layer ${layer}`)));
  control("layer-field").hidden = layers.length < 2;
  const concepts = [...new Set(FEATURES.map((f) => f.concept).filter(Boolean))].sort();
  control("concept").append(
    ...concepts.map((name) => h("option", { value: name }, visible(name).replaceAll("_", " "))),
  );
  control("concept-field").hidden = !concepts.length;
  control("sort").querySelector("[value=precision]").hidden = !concepts.length;
  for (const id of ["layer", "concept", "kind", "sort"]) control(id).addEventListener("change", updateList);
  control("search").addEventListener("input", updateList);
  control("filters").addEventListener("submit", (event) => event.preventDefault());
  for (const feature of FEATURES) rows.set(feature.place, listRow(feature));
  updateList();
}

function listRow(feature) {
  return h(
    "li",
    {},
    h(
      "a",
      { class: "row", href: href(feature), "data-place": feature.place },
      h("span", { class: "place" }, feature.place),
      h("span", { class: "name" }, feature.dead ? "dead: fires on nothing" : visible(feature.name) || "no words"),
      h("span", { class: "value" }),
      h(
        "span",
        { class: "more" },
        feature.concept && h("span", { class: "concept" }, visible(feature.concept).replaceAll("_", " ")),
        h("span", { class: "words" }, likelierLine(feature)),
      ),
    ),
  );
}

function likelierLine(feature) {
  if (!feature.likelier.length) return "";
  const words = feature.likelier.slice(0, 8).map(([word]) => visible(word.trim()) || "␣");
  return `${feature.effects ? "→" : "lens →"} ${words.join("  ")}`;
}

function updateList() {
  const terms = control("search").value.toLowerCase().split(/\s+/).filter(Boolean);
  const [layer, concept, kind] = ["layer", "concept", "kind"].map((id) => control(id).value);
  const order = ORDERS[control("sort").value];
  shown = FEATURES.filter(
    (feature) =>
      (layer === "all" || feature.layer === Number(layer)) &&
      (concept === "all" || feature.concept === concept) &&
      FILTERS[kind](feature) &&
      terms.every((term) => feature.haystack.includes(term)),
  );
  if (order.value) shown.sort((a, b) => order.value(b) - order.value(a) || a.layer - b.layer || a.index - b.index);
  for (const feature of shown) rows.get(feature.place).querySelector(".value").textContent = order.show(feature);
  const none = h("li", { class: "none" }, "Nothing matches. Esc clears the search.");
  control("rows").replaceChildren(...(shown.length ? shown.map((f) => rows.get(f.place)) : [none]));
  const all = shown.length === FEATURES.length;
  control("count").textContent = all
    ? plural(FEATURES.length, "feature")
    : `${count(shown.length)} of ${plural(FEATURES.length, "feature")}`;
}

function links() {
  return shown.map((feature) => rows.get(feature.place).firstChild);
}

function markCurrent(place) {
  for (const link of control("rows").querySelectorAll("[aria-current]")) link.removeAttribute("aria-current");
  const row = rows.get(place);
  if (!row) return;
  row.firstChild.setAttribute("aria-current", "true");
  if (row.isConnected && isWide()) row.firstChild.scrollIntoView({ block: "nearest" });
}

// The next row by `step`, from the focused one or the one that is open. Wide pages show it at once.
function walk(step) {
  const all = links();
  if (!all.length) return;
  let at = all.indexOf(document.activeElement);
  if (at < 0) at = all.findIndex((link) => link.hasAttribute("aria-current"));
  const next = at < 0 ? (step > 0 ? 0 : all.length - 1) : Math.max(0, Math.min(all.length - 1, at + step));
  focusRow(all[next]);
}

function focusRow(link) {
  link.focus();
  if (isWide()) goWalking(link.getAttribute("href"));
}
