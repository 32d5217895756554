// Tables that are sorted by a click on a heading and searched. Each <tbody> is one item, its first row tells its values.

function cellValue(item, column) {
  const cell = item.rows[0].cells[column];
  return cell.dataset.value ?? cell.textContent.trim();
}

function sortItems(table, column, descending) {
  const items = [...table.tBodies];
  const keys = new Map(items.map((item) => [item, cellValue(item, column)]));
  const numeric = items.every((item) => keys.get(item) === "" || !Number.isNaN(Number(keys.get(item))));
  const order = (one, other) => {
    const [a, b] = [keys.get(one), keys.get(other)];
    // What has no value comes last either way.
    if (a === "" || b === "") return (a === "") - (b === "");
    const before = numeric ? a - b : a.localeCompare(b, undefined, { numeric: true });
    return descending ? -before : before;
  };
  table.append(...items.sort(order));
}

function makeSortable(table) {
  const headings = [...table.tHead.rows[0].cells];
  headings.forEach((heading, column) => {
    if (heading.classList.contains("plain")) return;
    const button = document.createElement("button");
    button.type = "button";
    button.append(...heading.childNodes);
    heading.append(button);
    button.addEventListener("click", () => {
      const before = heading.getAttribute("aria-sort");
      // Numbers are of interest from the top.
      const first = heading.classList.contains("number") ? "descending" : "ascending";
      const next = before ? (before === "ascending" ? "descending" : "ascending") : first;
      headings.forEach((other) => other.removeAttribute("aria-sort"));
      heading.setAttribute("aria-sort", next);
      sortItems(table, column, next === "descending");
    });
  });
}

function makeSearchable(toolbar) {
  const table = document.getElementById(toolbar.dataset.for);
  const input = toolbar.querySelector("input");
  const select = toolbar.querySelector("select");
  const count = toolbar.querySelector("output");
  const items = [...table.tBodies];
  const texts = new Map(items.map((item) => [item, item.rows[0].textContent.toLowerCase()]));
  const search = () => {
    const words = input.value.toLowerCase().split(/\s+/).filter(Boolean);
    let found = 0;
    for (const item of items) {
      const group = !select?.value || JSON.parse(item.dataset.groups).includes(select.value);
      item.hidden = !group || !words.every((word) => texts.get(item).includes(word));
      found += !item.hidden;
    }
    count.value = found === items.length ? `${items.length} videos` : `${found} of ${items.length} videos`;
  };
  input.addEventListener("input", search);
  select?.addEventListener("change", search);
  search();
}

document.querySelectorAll("table.sortable").forEach(makeSortable);
document.querySelectorAll(".toolbar").forEach(makeSearchable);
