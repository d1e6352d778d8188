// The hierarchy: nodes open on demand, so that a child of several parents costs nothing until it is looked at.

function treeView(layer) {
  const { tree } = layer;
  const nodes = new Map(tree.nodes.map((node) => [node.id, node]));
  const children = new Map(tree.nodes.map((node) => [node.id, []]));
  const parents = new Map(tree.nodes.map((node) => [node.id, 0]));
  for (const { parent, child, weight } of tree.links) {
    children.get(parent).push([child, weight]);
    parents.set(child, parents.get(child) + 1);
  }
  const list = h("ul", { class: "tree" }, tree.roots.map((id) => h("li", {}, branch(id, null))));

  function branch(id, weight) {
    const node = nodes.get(id);
    const details = h("details", {}, h("summary", {}, headline(node, weight)));
    details.addEventListener("toggle", () => {
      if (details.open && details.children.length === 1) details.append(body(node));
    });
    return details;
  }

  function headline(node, weight) {
    return [
      h("span", { class: "place" }, node.id),
      weight !== null && h("span", { class: "number" }, percent(weight, 0)),
      h("span", { class: "name" }, visible(node.name || "") || "no words"),
      node.concept && h("span", { class: "concept" }, visible(node.concept).replaceAll("_", " "), typeof node.precision === "number" && ` ${node.precision.toFixed(2)}`),
      parents.get(node.id) > 1 && h("small", {}, `of ${parents.get(node.id)} parents`),
    ];
  }

  function body(node) {
    const below = children.get(node.id);
    const total = below.reduce((sum, [, weight]) => sum + weight, 0) || 1;
    return h(
      "div",
      { class: "node" },
      h("p", { class: "note" }, `${percent(node.energy)} of its level’s energy`),
      likelier(node),
      (node.contexts || []).length > 0 && h("details", { class: "in-context" }, h("summary", {}, "in context"), contexts(node)),
      below.length > 0 && h("ul", {}, below.map(([child, weight]) => h("li", {}, branch(child, weight / total)))),
    );
  }

  function likelier(node) {
    const measured = (node.raised || []).length > 0;
    const words = measured ? node.raised : node.lens || [];
    return words.length > 0 && h("p", { class: "words" }, measured ? "→ " : "lens → ", words.map((word) => visible(word.trim()) || "␣").join("  "));
  }

  function contexts(node) {
    return h(
      "ol",
      { class: "contexts" },
      node.contexts.map(([before, peak, after]) =>
        h(
          "li",
          {},
          h("span", { class: "text", dir: "auto" }, visible(before), h("mark", { class: "shaded", vars: { s: 1 } }, visible(peak)), visible(after)),
        ),
      ),
    );
  }

  const all = (open) => () => {
    // What opens brings children that are to open as well; a toggle event comes too late for that.
    const closed = () => [...list.querySelectorAll("details:not(.in-context)")].filter((details) => details.open !== open);
    for (let found = closed(); found.length; found = closed()) {
      for (const details of found) {
        details.open = open;
        if (open && details.children.length === 1) details.append(body(nodes.get(details.querySelector(".place").textContent)));
      }
    }
  };
  return [
    h(
      "header",
      { class: "title" },
      h("h2", { tabindex: "-1" }, `Hierarchy of layer ${layer.layer}`),
      h("p", { class: "sub" }, `levels of ${tree.sizes.join(", ")} features, finest first. Percentages: of the siblings’ weights. Links above ${tree.threshold} of a child’s strongest, at most ${tree.most} children.`),
    ),
    h("div", { class: "tools" }, h("button", { type: "button", onclick: all(true) }, "Open all"), h("button", { type: "button", onclick: all(false) }, "Close all")),
    list,
  ];
}
