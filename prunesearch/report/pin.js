// The reader pins up to two candidates, in the plot or by a table's buttons; a table below the plot compares them.
// Data of the study is only set as text, never as HTML.
(() => {
  "use strict";
  const { rows, candidates } = JSON.parse(document.getElementById("candidates").textContent);
  const plot = document.getElementById("front");
  const panel = document.getElementById("pins");
  const clear = panel.querySelector("button");
  const buttons = document.querySelectorAll("button[data-pin]");
  const rings = plot.data.findIndex((trace) => trace.uid === "pinned");
  let pinned = [];

  const made = (tag, text, attributes = {}) => {
    const element = document.createElement(tag);
    element.textContent = text;
    for (const [name, value] of Object.entries(attributes)) element.setAttribute(name, value);
    return element;
  };
  const row = (...cells) => {
    const element = document.createElement("tr");
    element.append(...cells);
    return element;
  };
  const fixed = (value, decimals) =>
    value.toLocaleString("en", { minimumFractionDigits: decimals, maximumFractionDigits: decimals });
  const signed = (value, decimals) => {
    const size = fixed(Math.abs(value), decimals);
    return /[1-9]/.test(size) ? (value < 0 ? "−" : "+") + size : size;
  };
  const shown = (values, decimals) => (values ? values.map((value) => fixed(value, decimals)).join("/") : "–");
  const difference = ([first, second], decimals) =>
    first && second ? second.map((value, i) => signed(value - first[i], decimals)).join("/") : "–";

  const table = (pair) => {
    const strips = pair.map(({ strip, removed }) => {
      const cell = document.createElement("td");
      cell.append(made("span", strip, { role: "img", "aria-label": removed }));
      return cell;
    });
    const numbers = rows.map(([label, decimals], i) => {
      const both = pair.map(({ values }) => values[i]);
      const cells = both.map((values) => made("td", shown(values, decimals)));
      if (pair.length === 2) cells.push(made("td", difference(both, decimals)));
      return row(made("th", label, { scope: "row" }), ...cells);
    });
    const titles = pair.map(({ title }, i) => made("th", `${i + 1}: ${title}`, { scope: "col" }));
    if (pair.length === 2) {
      titles.push(made("th", "2 minus 1", { scope: "col" }));
      strips.push(document.createElement("td"));
    }
    panel.querySelector("thead").replaceChildren(row(document.createElement("td"), ...titles));
    panel.querySelector("tbody").replaceChildren(row(made("th", "layers", { scope: "row" }), ...strips), ...numbers);
  };

  const show = () => {
    const keys = plot.data[rings].customdata;
    const rank = (key) => pinned.indexOf(key) + 1;
    Plotly.restyle(
      plot,
      { "marker.opacity": [keys.map((key) => (rank(key) ? 1 : 0))], text: [keys.map((key) => String(rank(key) || "\u00a0"))] },
      [rings],
    );
    for (const button of buttons) button.setAttribute("aria-pressed", String(rank(button.dataset.pin) > 0));
    table(pinned.map((key) => candidates[key]));
    panel.querySelector("p").hidden = pinned.length > 0;
    panel.querySelector(".scroll").hidden = clear.hidden = pinned.length === 0;
  };
  const toggle = (key) => {
    pinned = pinned.includes(key) ? pinned.filter((other) => other !== key) : [...pinned, key].slice(-2);
    show();
  };

  plot.on("plotly_click", ({ points }) => toggle(points[0].customdata));
  for (const button of buttons) button.addEventListener("click", () => toggle(button.dataset.pin));
  clear.addEventListener("click", () => {
    pinned = [];
    show();
    panel.focus(); // the button that had the focus is hidden now
  });
})();
