"use strict";
(() => {
  // Tooltips at once, and on touch: the drawings' own titles, shown as text.
  const tip = document.createElement("div");
  tip.id = "tip";
  tip.hidden = true;
  document.body.append(tip);
  const point = (event) => {
    let mark = event.target.closest("svg circle, svg rect");
    if (mark && mark.parentNode.tagName === "g") mark = mark.parentNode;
    const title = mark && mark.querySelector(":scope > title");
    const words = mark && (mark.dataset.tip || (title && title.textContent));
    tip.hidden = !words;
    if (!words) return;
    if (title) {
      mark.dataset.tip = words;
      mark.setAttribute("aria-label", words);
      title.remove();
    }
    tip.textContent = words;
    const wide = document.documentElement.clientWidth;
    tip.style.top = `${event.pageY + 14}px`;
    tip.style.left = `${Math.max(8, Math.min(event.pageX + 10, window.scrollX + wide - tip.offsetWidth - 8))}px`;
  };
  document.addEventListener("pointerover", point);
  document.addEventListener("click", point);

  // The table: search, filter, sort.
  const table = document.getElementById("decisions");
  const tools = document.getElementById("tools");
  if (!table || !tools) return;
  tools.hidden = false;
  const body = table.tBodies[0];
  const rows = [...body.rows].map((row) => ({ row, text: row.textContent.toLowerCase() }));
  const [search, action, shown] = [tools.querySelector("input"), tools.querySelector("select"), tools.querySelector("output")];
  const apply = () => {
    const wanted = search.value.trim().toLowerCase().split(/\s+/);
    let count = 0;
    for (const { row, text } of rows) {
      const fits = wanted.every((word) => text.includes(word)) && (!action.value || row.dataset.a === action.value);
      row.hidden = !fits;
      count += fits;
    }
    shown.textContent = `${count} of ${rows.length} shown`;
  };
  search.addEventListener("input", apply);
  action.addEventListener("change", apply);
  apply();
  const heads = [...table.tHead.rows[0].cells];
  heads.forEach((head, column) => {
    const button = document.createElement("button");
    button.type = "button";
    button.append(...head.childNodes);
    head.append(button);
    const key = (row) => row.cells[column].textContent;
    button.addEventListener("click", () => {
      const up = head.getAttribute("aria-sort") !== "ascending";
      heads.forEach((other) => other.removeAttribute("aria-sort"));
      head.setAttribute("aria-sort", up ? "ascending" : "descending");
      const sorted = rows.map(({ row }) => ({ row, word: key(row), value: parseFloat(key(row)) }));
      const numeric = head.classList.contains("n");
      sorted.sort((a, b) => {
        if (!numeric) return (up ? 1 : -1) * a.word.localeCompare(b.word, undefined, { numeric: true });
        if (Number.isNaN(a.value) || Number.isNaN(b.value)) return Number.isNaN(a.value) - Number.isNaN(b.value);
        return (up ? 1 : -1) * (a.value - b.value);
      });
      body.append(...sorted.map(({ row }) => row));
    });
  });
})();
