// The page with the slider over L: draws what examples/latents.py recorded. No libraries.
(() => {
  "use strict";
  const place = document.getElementById("latents");
  const data = JSON.parse(document.getElementById("latents-data").textContent);
  const COLOURS = ["#1f77b4", "#ff7f0e", "#2ca02c", "#d62728", "#9467bd", "#8c564b", "#e377c2", "#7f7f7f", "#bcbd22", "#17becf"];
  const SIDE = 8;
  const MEASURES = [
    ["gain", "gain, nats", 2], ["nll", "NLL, nats", 2], ["elbo_kl", "KL, nats", 2], ["mutual_information", "MI, nats", 2],
    ["active_directions", "directions", 0], ["certified", "L certified", 2], ["measured", "L measured", 2],
  ];

  const bytes = (text) => Uint8Array.from(atob(text), (c) => c.charCodeAt(0));
  const rows = data.rows.map((row) => ({
    ...row,
    means: new Int16Array(bytes(row.means).buffer),
    deviations: new Int16Array(bytes(row.deviations).buffer),
    grid: bytes(row.grid),
    samples: bytes(row.samples),
    reconstructions: bytes(row.reconstructions),
  }));
  const originals = bytes(data.originals);

  function element(name, attributes = {}, ...children) {
    const made = document.createElement(name);
    for (const [key, value] of Object.entries(attributes)) made.setAttribute(key, value);
    made.append(...children);
    return made;
  }

  // Images of SIDE x SIDE, side by side, one pixel for each of theirs; the style sheet enlarges them.
  function sheet(canvas, images, columns) {
    const count = images.length / SIDE ** 2;
    const gap = 1;
    canvas.width = columns * (SIDE + gap) - gap;
    canvas.height = Math.ceil(count / columns) * (SIDE + gap) - gap;
    const context = canvas.getContext("2d");
    const picture = context.createImageData(canvas.width, canvas.height);
    for (let k = 0; k < count; k++) {
      const left = (k % columns) * (SIDE + gap), top = Math.floor(k / columns) * (SIDE + gap);
      for (let p = 0; p < SIDE ** 2; p++) {
        const at = 4 * ((top + Math.floor(p / SIDE)) * canvas.width + left + (p % SIDE));
        picture.data.fill(255 - images[k * SIDE ** 2 + p], at, at + 3);
        picture.data[at + 3] = 255;
      }
    }
    context.putImageData(picture, 0, 0);
  }

  function plane(canvas, row) {
    const size = canvas.width, scale = size / (2 * data.extent), context = canvas.getContext("2d");
    context.clearRect(0, 0, size, size);
    data.labels.forEach((label, k) => {
      const [x, y] = [0, 1].map((i) => row.means[2 * k + i] * data.unit);
      const [dx, dy] = [0, 1].map((i) => row.deviations[2 * k + i] * data.unit);
      context.strokeStyle = context.fillStyle = COLOURS[label];
      const left = size / 2 + x * scale, top = size / 2 - y * scale;
      context.globalAlpha = 0.12;
      context.beginPath();
      context.ellipse(left, top, dx * scale, dy * scale, 0, 0, 2 * Math.PI);
      context.stroke();
      context.globalAlpha = 1;
      context.beginPath();
      context.arc(left, top, size / 150, 0, 2 * Math.PI);
      context.fill();
    });
  }

  const figure = (canvas, caption) => element("figure", {}, canvas, element("figcaption", {}, caption));
  const canvas = (id, label) => element("canvas", { id: `latents-${id}`, role: "img", "aria-label": label });
  const slider = element("input", {
    type: "range", id: "latents-slider", min: 0, max: rows.length - 1, step: 1, value: 0, "aria-label": "L",
  });
  const shown = element("output", { id: "latents-L", for: "latents-slider" });
  const planes = canvas("plane", "posterior means of the test digits"), grid = canvas("grid", "decoded plane");
  const samples = canvas("samples", "samples"), pairs = canvas("pairs", "digits and reconstructions");
  const values = MEASURES.map(() => element("td"));
  planes.width = planes.height = 600;
  const legend = element("span", { class: "latents-legend" });
  COLOURS.forEach((colour, digit) => legend.append(element("b", { style: `color: ${colour}` }, String(digit)), " "));
  place.replaceChildren(
    element("label", { for: "latents-slider" }, "L = ", shown), slider,
    element("div", { class: "latents-scroll" }, element("table", {},
      element("thead", {}, element("tr", {}, ...MEASURES.map(([, heading]) => element("th", {}, heading)))),
      element("tbody", {}, element("tr", {}, ...values)))),
    element("div", { class: "latents-figures" },
      figure(planes, element("span", {}, "Where the encoder puts the test digits: means, with ellipses of one deviation. ", legend)),
      figure(grid, `What the decoder makes of the plane, from -${data.extent} to ${data.extent}.`),
      figure(pairs, "Test digits, and below each its reconstruction."),
      figure(samples, "Samples: latents from the prior, decoded.")),
  );

  function show(k) {
    const row = rows[k];
    shown.textContent = String(row.L);
    slider.setAttribute("aria-valuetext", `L = ${row.L}`);
    MEASURES.forEach(([name, , digits], i) => {
      values[i].textContent = (Math.round(row[name] * 100) / 100 + 0).toFixed(digits);
    });
    plane(planes, row);
    sheet(grid, row.grid, data.grid);
    sheet(samples, row.samples, 10);
    sheet(pairs, new Uint8Array([...originals, ...row.reconstructions]), 10);
  }

  // The address says which L is shown, so that a link can.
  function fromAddress() {
    const k = rows.findIndex((row) => `#L=${row.L}` === location.hash);
    if (k >= 0) slider.value = k;
    show(Number(slider.value));
  }
  slider.addEventListener("input", () => {
    history.replaceState(null, "", `#L=${rows[slider.value].L}`);
    show(Number(slider.value));
  });
  addEventListener("hashchange", fromAddress);
  fromAddress();
})();
