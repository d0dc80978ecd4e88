"use strict";
// The page is whole without this script; it sorts tables, chooses which agents are drawn, and names lines at their ends.
document.documentElement.classList.add("js");

function sortBy(button) {
  const head = button.closest("th"), row = head.parentElement, body = head.closest("table").tBodies[0];
  const column = [...row.children].indexOf(head), text = button.dataset.kind === "text";
  const other = { ascending: "descending", descending: "ascending" };
  const order = other[head.getAttribute("aria-sort")] || button.dataset.first;
  for (const cell of row.children) cell.removeAttribute("aria-sort");
  head.setAttribute("aria-sort", order);
  const sign = order === "ascending" ? 1 : -1;
  const value = line => line.children[column].dataset.order;
  const rows = [...body.rows].sort((a, b) => {
    const [x, y] = [value(a), value(b)];
    if (text) return sign * x.localeCompare(y);
    if (x === "" || y === "") return (x === "") - (y === "");
    return sign * (Number(x) - Number(y));
  });
  body.append(...rows);
  const status = head.closest(".board").querySelector("[role=status]");
  status.textContent = `Sorted by ${button.textContent}, ${order}.`;
}

function nameEnds(plot) {
  const ends = [...plot.querySelectorAll(".marks:not([hidden]) .end")];
  ends.sort((a, b) => a.dataset.at - b.dataset.at);
  const gap = 100 * 13 / plot.clientHeight;
  const groups = [];  // names that would overlap move apart together, around the mean of where they belong
  for (const end of ends) {
    groups.push({ ends: [end], sum: Number(end.dataset.at) });
    for (;;) {
      const last = groups[groups.length - 1], before = groups[groups.length - 2];
      if (!before || bottom(last) - (bottom(before) + gap * (before.ends.length - 1)) >= gap) break;
      before.ends.push(...last.ends);
      before.sum += last.sum;
      groups.pop();
    }
  }
  function bottom(group) { return group.sum / group.ends.length - gap * (group.ends.length - 1) / 2; }
  for (const group of groups)
    group.ends.forEach((end, i) => { end.style.bottom = `${bottom(group) + i * gap}%`; });
}

function draw(board) {
  for (const box of board.querySelectorAll(".choices input"))
    for (const part of board.querySelectorAll(`.charts [data-agent="${box.value}"]`))
      part.toggleAttribute("hidden", !box.checked);
  board.querySelectorAll(".charts .plot").forEach(nameEnds);
}

function light(board, agent) {
  board.querySelectorAll(".charts").forEach(charts => charts.classList.toggle("lit", agent !== null));
  for (const part of board.querySelectorAll(".charts [data-agent]")) part.classList.toggle("on", part.dataset.agent === agent);
}

function reveal() {
  const target = location.hash && document.getElementById(decodeURIComponent(location.hash.slice(1)));
  for (let at = target; at; at = at.parentElement) if (at.tagName === "DETAILS") at.open = true;
  if (target) target.scrollIntoView();
}

for (const button of document.querySelectorAll(".sortable thead button")) button.addEventListener("click", () => sortBy(button));
for (const board of document.querySelectorAll(".board")) {
  const boxes = [...board.querySelectorAll(".choices input")], first = boxes.map(box => box.checked);
  board.querySelector(".choices").addEventListener("change", () => draw(board));
  for (const button of board.querySelectorAll("[data-choose]"))
    button.addEventListener("click", () => {
      boxes.forEach((box, i) => { box.checked = { all: true, none: false, first: first[i] }[button.dataset.choose]; });
      draw(board);
    });
  for (const label of board.querySelectorAll(".choices label")) {
    const on = () => light(board, label.querySelector("input").checked ? label.dataset.agentKey : null);
    const off = () => light(board, null);
    label.addEventListener("mouseenter", on);
    label.addEventListener("mouseleave", off);
    label.addEventListener("focusin", on);
    label.addEventListener("focusout", off);
  }
  draw(board);
}
addEventListener("hashchange", reveal);
addEventListener("resize", () => document.querySelectorAll(".charts .plot").forEach(nameEnds));
reveal();
