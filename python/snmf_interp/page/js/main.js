// Routes, keys, and the start.

const wide = matchMedia("(min-width: 60rem)");
const VIEWS = {
  feature: (layer, number) => {
    const feature = BY_PLACE.get(`${layer.layer}/${number}`);
    return feature && { title: `${feature.place} ${feature.name}`, nodes: featureView(feature), place: feature.place };
  },
  overlap: (layer) => ({ title: `Shared neurons of layer ${layer.layer}`, nodes: overlapView(layer) }),
  neurons: (layer) => ({ title: `Neurons of layer ${layer.layer}`, nodes: neuronsView(layer) }),
  neuron: (layer, number) =>
    number < layer.width ? { title: `Neuron ${number} of layer ${layer.layer}`, nodes: neuronView(layer, number) } : null,
  tree: (layer) => layer.tree && { title: `Hierarchy of layer ${layer.layer}`, nodes: treeView(layer) },
};
const pageTitle = document.title;
let walking = null;
// The feature that was open last, and what is to be done when the list is there.
let lastPlace = null;
let atList = null;

function isWide() {
  return wide.matches;
}

// Shows a feature on the way through the list: steps of one walk leave one entry in the history.
function goWalking(hash) {
  const again = walking === location.hash;
  walking = hash;
  if (again) location.replace(hash);
  else location.hash = hash;
}

function route() {
  const hash = location.hash;
  if (hash !== walking) walking = null;
  const [, first, number, name, item] = hash.split("/");
  const layer = first === "layer" ? LAYERS.get(Number(number)) : undefined;
  const view = document.getElementById("view");
  const about = document.getElementById("about");
  let page = null;
  if (layer && name && Object.hasOwn(VIEWS, name)) page = VIEWS[name](layer, item === undefined ? NaN : Number(item));
  const isList = hash === "" || hash === "#" || hash === "#/" || hash === "#/features";
  const kind = page ? (page.place ? "feature" : name) : hash === "#/about" ? "about" : isList ? "list" : "lost";
  document.body.dataset.view = kind;
  // The run's facts fill the second column until a feature is chosen.
  about.hidden = kind !== "about" && kind !== "list";
  view.replaceChildren(...(page ? page.nodes.flat().filter(Boolean) : kind === "lost" ? lost() : []));
  document.title = page ? `${visible(page.title)} · ${pageTitle}` : pageTitle;
  if (page && page.place) lastPlace = page.place;
  markCurrent(page && page.place);
  markTabs(kind, layer);
  drawCharts();
  const waiting = atList;
  atList = null;
  if (waiting && listIsShown()) {
    waiting();
  } else if (!walking) {
    scrollTo(0, 0);
    document.getElementById("main").scrollTo(0, 0);
    // Where the page has changed as a whole, the focus goes there; in the list it stays.
    const heading = document.querySelector(kind === "about" ? "#about h2" : "#view h2");
    const inList = document.activeElement && document.getElementById("list").contains(document.activeElement);
    if (heading && hash && !(inList && isWide())) heading.focus({ preventScroll: true });
  } else {
    document.getElementById("main").scrollTo(0, 0);
  }
}

function lost() {
  return [
    h(
      "header",
      { class: "title" },
      h("h2", { tabindex: "-1" }, "Not in this report"),
      h("p", {}, "The address names nothing that this page holds. ", h("a", { href: "#/features" }, "All features")),
    ),
  ];
}

function markTabs(kind, layer) {
  const first = layer || DATA.layers[0];
  const tabOf = { feature: "features", list: "features", neuron: "neurons" };
  for (const tab of document.querySelectorAll("#tabs a")) {
    const name = tab.dataset.tab;
    if (name === "tree") {
      const target = first.tree ? first : DATA.layers.find((one) => one.tree);
      tab.hidden = !target;
      if (target) tab.href = `#/layer/${target.layer}/tree`;
    } else if (name === "overlap" || name === "neurons") {
      tab.href = `#/layer/${first.layer}/${name}`;
    }
    if ((tabOf[kind] || kind) === name) tab.setAttribute("aria-current", "page");
    else tab.removeAttribute("aria-current");
  }
  // The same view of the other layers.
  const switcher = document.getElementById("layers");
  const views = { overlap: "overlap", neurons: "neurons", neuron: "neurons", tree: "tree" };
  const others = views[kind] ? DATA.layers.filter((one) => kind !== "tree" || one.tree) : [];
  switcher.hidden = others.length < 2;
  switcher.replaceChildren(
    "layer ",
    ...others.map((one) => h("a", { href: `#/layer/${one.layer}/${views[kind]}`, "aria-current": one === layer && "true" }, String(one.layer))),
  );
}

function onKey(event) {
  if (event.ctrlKey || event.metaKey || event.altKey || event.isComposing) return;
  const search = control("search");
  const list = document.getElementById("list");
  const target = event.target;
  const key = event.key;
  if (target === search) {
    if (key === "Escape") {
      if (search.value) {
        search.value = "";
        updateList();
      } else {
        search.blur();
      }
    } else if (key === "ArrowDown" && shown.length) {
      focusRow(links()[0]);
    } else if (key === "Enter" && shown.length) {
      location.hash = href(shown[0]);
    } else {
      return;
    }
    event.preventDefault();
    return;
  }
  if (target.closest("input, select, textarea")) return;
  const inList = list.contains(target);
  const step = { j: 1, k: -1, ArrowDown: 1, ArrowUp: -1 }[key];
  if (step && (inList || key.length === 1) && listIsShown()) walk(step);
  else if (inList && key === "Home") focusRow(links()[0]);
  else if (inList && key === "End") focusRow(links().at(-1));
  else if (key === "/") {
    toList(() => {
      search.focus();
      search.select();
    });
  } else if (key === "?") location.hash = "#/about";
  else if (key === "Escape") escape();
  else return;
  event.preventDefault();
}

function listIsShown() {
  return document.getElementById("list").offsetParent !== null;
}

// Go to the list where it is not on the page, and do something there.
function toList(then) {
  if (listIsShown()) {
    then();
  } else {
    atList = then;
    location.hash = "#/features";
  }
}

function escape() {
  if (isWide() && document.body.dataset.view !== "feature" && document.body.dataset.view !== "list") {
    location.hash = "#/features";
  }
  toList(() => {
    const row = rows.get(lastPlace);
    const target = row && row.isConnected ? row.firstChild : links()[0];
    if (target) target.focus();
  });
}

function start() {
  startTheme();
  startList();
  document.documentElement.classList.add("ready");
  addEventListener("hashchange", route);
  document.addEventListener("keydown", onKey);
  themeListeners.add(drawCharts);
  let width = innerWidth;
  addEventListener("resize", () => {
    if (innerWidth !== width) drawCharts();
    width = innerWidth;
  });
  route();
}

start();
