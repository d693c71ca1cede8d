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

  // Another threshold: what each position of the slider would merge, counted from the marks' own values.
  const chooser = document.getElementById("chooser");
  if (chooser) {
    const { low, high, step, chosen, key, above } = chooser.dataset;
    const [slider, told] = [chooser.querySelector("input"), chooser.querySelector("output")];
    const [line, button] = [chooser.querySelector("code"), chooser.querySelector("button")];
    const merges = above === "1"
      ? (key === "at_most" ? (value, tau) => value >= tau : (value, tau) => value > tau)
      : (key === "at_most" ? (value, tau) => value <= tau : (value, tau) => value < tau);
    const rows = [...chooser.querySelectorAll("svg g.row")].map((row) => ({
      sum: row.querySelector(".sum"),
      cells: [...row.querySelectorAll("g[data-v]")].map((cell) => ({
        values: cell.dataset.v.split(" ").filter(Boolean).map(Number),
        settled: Number(cell.dataset.m),
        all: Number(cell.dataset.n),
        back: cell.querySelector(".rest"),
        share: cell.querySelector(".share"),
      })),
    }));
    const steps = Math.round((high - low) / step);
    const short = (value) => Number(value.toPrecision(6));
    const at = (position) => short(Number(low) + position * step);
    const start = Math.round((Number(chosen || (Number(low) + Number(high)) / 2) - low) / step);
    Object.assign(slider, { min: 0, max: steps, step: 1, value: start });
    const draw = () => {
      // The recipe's own τ need not lie on the slider's grid.
      const tau = chosen && Number(slider.value) === start ? Number(chosen) : at(Number(slider.value));
      let [merged, all] = [0, 0];
      for (const { sum, cells } of rows) {
        let [some, total] = [0, 0];
        for (const cell of cells) {
          const count = cell.settled + cell.values.reduce((sofar, value) => sofar + merges(value, tau), 0);
          if (cell.share) {
            const [top, height] = [Number(cell.back.getAttribute("y")), Number(cell.back.getAttribute("height"))];
            cell.share.setAttribute("height", height * count / cell.all);
            cell.share.setAttribute("y", top + height * (1 - count / cell.all));
          }
          some += count;
          total += cell.all;
        }
        if (sum) sum.textContent = `${some} of ${total}`;
        merged += some;
        all += total;
      }
      told.textContent = `${tau}: ${merged} of ${all} gated tensors merge`;
      line.textContent = `--set gate.${key}=${tau}`;
      slider.setAttribute("aria-valuetext", told.textContent);
      button.textContent = "Copy";
    };
    slider.addEventListener("input", draw);
    button.addEventListener("click", async () => {
      // A page from the disk may not be allowed to write the clipboard; the line is then selected instead.
      try {
        await navigator.clipboard.writeText(line.textContent);
        button.textContent = "Copied";
      } catch {
        window.getSelection().selectAllChildren(line);
        button.textContent = "Selected";
      }
    });
    chooser.hidden = false;
    draw();
  }

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
      const sorted = rows.map(({ row }) => ({ row, word: key(row), value: parseFloat(key(row).replace("−", "-")) }));
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
