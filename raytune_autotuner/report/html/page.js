"use strict";
(() => {
  const root = document.documentElement;
  const figures = JSON.parse(document.getElementById("figures").textContent);
  const charts = [...document.querySelectorAll(".chart")];
  const wanted = { trials: new Set(), level: null, latency: null };

  // Colours: a name such as "--good" in a figure is looked up in the page's style.
  const color = (name) => getComputedStyle(root).getPropertyValue(name).trim();
  const painted = (value) => {
    if (typeof value === "string") return value.startsWith("--") ? color(value) : value;
    if (Array.isArray(value)) return value.map(painted);
    if (value && typeof value === "object") {
      return Object.fromEntries(Object.entries(value).map(([key, inner]) => [key, painted(inner)]));
    }
    return value;
  };

  const template = () => {
    const axis = {
      gridcolor: color("--rule"), zerolinecolor: color("--rule"), linecolor: color("--rule"), automargin: true,
      title: { font: { size: 13 }, standoff: 12 },
    };
    return {
      layout: {
        font: { family: getComputedStyle(document.body).fontFamily, color: color("--ink"), size: 12 },
        paper_bgcolor: "rgba(0,0,0,0)", plot_bgcolor: "rgba(0,0,0,0)", xaxis: axis, yaxis: axis,
        margin: { l: 60, r: 20, t: 16, b: 46 }, hovermode: "closest", bargap: 0.3,
        modebar: { bgcolor: "rgba(0,0,0,0)", color: color("--faint"), activecolor: color("--ink") },
        hoverlabel: { bgcolor: color("--card"), bordercolor: color("--rule"), align: "left",
          font: { color: color("--ink") } },
        legend: { orientation: "h", y: 1.02, yanchor: "bottom", x: 0, xanchor: "left", bgcolor: "rgba(0,0,0,0)" },
      },
    };
  };

  const isShown = (meta) => {
    if (!meta || meta.trial === undefined) return true;
    const level = meta.level === undefined || meta.level === wanted.level;
    const latency = meta.latency === undefined || meta.latency === wanted.latency;
    return wanted.trials.has(meta.trial) && level && latency;
  };

  const settings = { responsive: true, displaylogo: false, displayModeBar: window.innerWidth < 640 ? false : "hover",
    modeBarButtonsToRemove: ["select2d", "lasso2d", "autoScale2d", "sendChartToCloud", "sendDataToCloud"],
    showSendToCloud: false, plotlyServerURL: "" };

  const draw = (place) => {
    const figure = painted(figures[place.dataset.chart]);
    const dark = color("--page");
    for (const trace of figure.data) {
      trace.visible = isShown(trace.meta);
      if (trace.type === "parcoords") {
        const ink = { color: color("--ink"), size: 11 };
        Object.assign(trace, { labelfont: { ...ink, size: 12 }, tickfont: { ...ink, shadow: "none" },
          rangefont: { color: "rgba(0,0,0,0)", size: 1 }, unselected: { line: { color: dark, opacity: 0.1 } } });
        const room = 115 * trace.dimensions.length;
        place.style.minWidth = `${room}px`;
        place.parentElement.style.overflowX = "auto";
      }
    }
    figure.layout.template = template();
    return window.Plotly.react(place, figure.data, figure.layout, settings);
  };

  const drawAll = async () => {
    for (const place of charts) await draw(place);
    root.dataset.drawn = String(charts.length);
  };

  // What the charts under load show.
  const controls = document.getElementById("load-controls");
  const readControls = () => {
    const ticked = [...controls.querySelectorAll("input:checked")];
    wanted.trials = new Set(ticked.map((box) => Number(box.value)));
    wanted.level = document.getElementById("load-level").value;
    wanted.latency = document.getElementById("load-latency-name").value;
  };
  const paintPicks = () => {
    for (const pick of document.querySelectorAll(".pick")) {
      pick.style.borderBottomColor = color(pick.dataset.color);
    }
  };
  if (controls) {
    readControls();
    controls.addEventListener("change", () => {
      readControls();
      charts.filter((place) => figures[place.dataset.chart].data.some((trace) => trace.meta)).forEach(draw);
    });
  }

  // The table of trials.
  const table = document.getElementById("trial-table");
  const cellValue = (row, index) => {
    const cell = row.cells[index];
    if (cell.dataset.v !== undefined) return Number(cell.dataset.v);
    return cell.textContent.trim().toLowerCase();
  };
  const compared = (a, b) => {
    if (typeof a === typeof b) return typeof a === "number" ? a - b : a.localeCompare(b, "en", { numeric: true });
    return typeof a === "number" ? -1 : 1;
  };
  const sortBy = (head) => {
    const index = head.cellIndex;
    const down = head.getAttribute("aria-sort") === "ascending";
    const body = table.tBodies[0];
    const keyed = [...body.rows].map((row) => [cellValue(row, index), row]);
    // A row without a value comes last, whichever way is sorted.
    const order = (a, b) => {
      if ((a[0] === "") !== (b[0] === "")) return a[0] === "" ? 1 : -1;
      return (down ? -1 : 1) * compared(a[0], b[0]);
    };
    keyed.sort(order);
    for (const other of table.tHead.rows[0].cells) other.setAttribute("aria-sort", "none");
    head.setAttribute("aria-sort", down ? "descending" : "ascending");
    body.append(...keyed.map(([, row]) => row));
  };
  const filter = () => {
    const state = document.getElementById("trial-state").value;
    const role = document.getElementById("trial-role").value;
    const words = document.getElementById("trial-search").value.toLowerCase().split(/\s+/).filter(Boolean);
    const rows = [...table.tBodies[0].rows];
    for (const row of rows) {
      const text = row.textContent.toLowerCase();
      row.hidden = (state && row.dataset.state !== state) || (role && row.dataset.role !== role)
        || !words.every((word) => text.includes(word));
    }
    const shown = rows.filter((row) => !row.hidden).length;
    document.getElementById("trial-count").textContent = `${shown} of ${rows.length} rows`;
  };
  if (table) {
    for (const head of table.tHead.rows[0].cells) {
      const cells = [...table.tBodies[0].rows].map((row) => row.cells[head.cellIndex]);
      head.classList.toggle("number", cells.some((cell) => cell.classList.contains("number")));
      head.firstChild.addEventListener("click", () => sortBy(head));
    }
    for (const name of ["trial-state", "trial-role", "trial-search"]) {
      document.getElementById(name).addEventListener("input", filter);
    }
    filter();
  }

  // Copying, also from a file, where the clipboard's own interface may be closed.
  const copy = async (text) => {
    try {
      await navigator.clipboard.writeText(text);
    } catch {
      const area = document.body.appendChild(document.createElement("textarea"));
      area.value = text;
      area.select();
      document.execCommand("copy");
      area.remove();
    }
  };
  for (const button of document.querySelectorAll("button.copy")) {
    button.addEventListener("click", async () => {
      await copy(button.closest(".copybox").querySelector("code").textContent);
      button.textContent = "Copied";
      setTimeout(() => { button.textContent = "Copy"; }, 1500);
    });
  }

  // Light and dark: the system's choice until somebody makes another.
  const dark = window.matchMedia("(prefers-color-scheme: dark)");
  const repaint = () => { paintPicks(); return drawAll(); };
  document.getElementById("theme").addEventListener("click", () => {
    const now = root.dataset.theme ?? (dark.matches ? "dark" : "light");
    root.dataset.theme = now === "dark" ? "light" : "dark";
    repaint();
  });
  dark.addEventListener("change", repaint);
  repaint();
})();
