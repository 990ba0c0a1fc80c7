(() => {
  "use strict";
  const table = document.getElementById("tensor-table");
  if (table) {
    const body = table.tBodies[0];
    const rows = Array.from(body.rows, (row, index) => {
      const layer = row.cells[1].textContent;
      const words = `${row.cells[0].textContent} ${row.cells[3].textContent} ${layer && "layer" + layer}`.toLowerCase();
      return { row, index, words, copied: row.classList.contains("copied") };
    });
    const collator = new Intl.Collator("en", { numeric: true });
    const heads = Array.from(table.querySelectorAll("th[data-column]"));
    const words = document.getElementById("filter");
    const kind = document.getElementById("kind");
    const shown = document.getElementById("shown");

    const show = () => {
      const wanted = words.value.toLowerCase().split(/\s+/).filter(Boolean);
      let found = 0;
      for (const item of rows) {
        const hit = wanted.every((word) => item.words.includes(word)) && (!kind.value || (kind.value === "copied") === item.copied);
        item.row.hidden = !hit;
        found += hit;
      }
      shown.value = `${found.toLocaleString("en")} of ${rows.length.toLocaleString("en")} tensors`;
    };

    const sort = (head, direction) => {
      const column = Number(head.dataset.column);
      const textual = "text" in head.dataset;
      const key = (item) => {
        const cell = item.row.cells[column];
        return textual ? cell.textContent : "v" in cell.dataset ? Number(cell.dataset.v) : null;
      };
      const keyed = rows.map((item) => ({ item, key: direction ? key(item) : item.index }));
      keyed.sort((a, b) => {
        if (a.key === null || b.key === null) {
          return (a.key === null) - (b.key === null) || a.item.index - b.item.index;
        }
        const order = textual && direction ? collator.compare(a.key, b.key) : a.key - b.key;
        return (direction || 1) * order || a.item.index - b.item.index;
      });
      body.append(...keyed.map(({ item }) => item.row));
      for (const other of heads) {
        other.removeAttribute("aria-sort");
      }
      if (direction) {
        head.setAttribute("aria-sort", direction > 0 ? "ascending" : "descending");
      }
    };

    for (const head of heads) {
      const button = document.createElement("button");
      button.type = "button";
      button.append(...head.childNodes);
      head.append(button);
      // Names rise first, figures fall first; the third press brings the order of the files back.
      const first = "text" in head.dataset || head.dataset.column === "1" ? 1 : -1;
      button.addEventListener("click", () => {
        const now = { ascending: 1, descending: -1 }[head.getAttribute("aria-sort")] || 0;
        sort(head, now === 0 ? first : now === first ? -first : 0);
      });
    }
    words.addEventListener("input", show);
    kind.addEventListener("change", show);
    document.getElementById("controls").hidden = false;
    show();
  }
  addEventListener("beforeprint", () => {
    for (const details of document.querySelectorAll("details")) {
      details.open = true;
    }
  });
  document.documentElement.dataset.ready = table ? String(table.tBodies[0].rows.length) : "0";
})();
