"use strict";
const dialog = document.querySelector("dialog");
const [large, caption] = dialog.children;
let album = [], place = 0;
function show(next) {
  place = (next + album.length) % album.length;
  const small = album[place].querySelector("img");
  large.src = small.src;
  large.alt = small.alt;
  large.className = small.className;
  caption.textContent = `${album[place].parentElement.querySelector("figcaption").textContent} (${small.alt})`;
}
document.addEventListener("click", (event) => {
  const button = event.target.closest(".zoom");
  if (!button) return;
  album = [...button.closest(".sample").querySelectorAll(".zoom")];
  show(album.indexOf(button));
  dialog.showModal();
});
document.querySelector("#size")?.addEventListener("input", (event) => {
  document.documentElement.style.setProperty("--picture", `${event.target.value}px`);
});

// A slider over each sample: on both sides of a line lie two of its pictures, over the image.
const place_of = (small, base) => {
  const [w, h] = [small.getAttribute("width") / base.getAttribute("width"), small.getAttribute("height") / base.getAttribute("height")];
  return `left:${50 - 50 * w}%;top:${50 - 50 * h}%;width:${100 * w}%;height:${100 * h}%`;
};
function build_slider(sample) {
  const given = sample.querySelector(".given");
  const base = given.querySelector("img");
  const pictures = [...sample.querySelectorAll(".zoom img")];
  if (!base || pictures.length < 2) return;
  const made = document.createElement("figure");
  made.className = "compare";
  made.innerHTML = '<div class="frame"><img><div class="layer left"></div><div class="layer right"></div><div class="line"></div>' +
    '<input type="range" min="0" max="100" step="0.5" value="50"></div><div class="sides"><select></select><select></select></div>';
  const frame = made.querySelector(".frame");
  frame.querySelector("img").src = base.src;
  frame.querySelector("img").alt = base.alt;
  const slider = frame.querySelector("input");
  slider.setAttribute("aria-label", `${sample.querySelector("h3").textContent}: where the left picture ends`);
  const move = () => frame.style.setProperty("--at", `${slider.value}%`);
  slider.addEventListener("input", move);
  move();
  const whole = pictures.filter((small) => small.getAttribute("width") === base.getAttribute("width"));
  const first = [whole[1] ?? pictures[1], whole.at(-1)];
  made.querySelectorAll("select").forEach((select, side) => {
    select.setAttribute("aria-label", side ? "Picture on the right" : "Picture on the left");
    let group = select, heading = null;
    pictures.forEach((small, number) => {
      const above = small.closest(".made > div")?.querySelector("h4").textContent ?? null;
      if (above !== heading) {
        heading = above;
        group = select.appendChild(document.createElement("optgroup"));
        group.label = above;
      }
      const title = small.closest("figure").querySelector("figcaption").textContent;
      group.append(new Option(title, number, false, small === first[side]));
    });
    const put = () => {
      const small = pictures[select.value];
      const large = document.createElement("img");
      large.src = small.src;
      large.alt = small.alt;
      large.className = small.className;
      large.style.cssText = place_of(small, base);
      frame.querySelectorAll(".layer")[side].replaceChildren(large);
    };
    select.addEventListener("change", put);
    put();
  });
  given.prepend(made);
}
document.querySelectorAll(".sample").forEach(build_slider);

addEventListener("beforeprint", () => document.querySelectorAll("details").forEach((details) => { details.open = true; }));

// The page of a live run: the file is written again, so load it again, and leave everything as the reader has set it.
const live_s = Number(document.body.dataset.live ?? 0);
if (live_s) {
  const key = `maskmatch ${location.pathname}`;
  const controls = () => [...document.querySelectorAll("input, select")];
  const [reload, age] = [document.querySelector("#reload"), document.querySelector("#age")];
  const recall = () => {
    try { return JSON.parse(sessionStorage.getItem(key) ?? "null"); } catch { return null; } // the reader forbids it
  };
  const keep = (state) => { try { sessionStorage.setItem(key, JSON.stringify(state)); } catch { } };
  const kept = recall();
  if (kept) {
    document.querySelectorAll("details").forEach((details, number) => { details.open = kept.open[number] ?? details.open; });
    if (kept.set.length === controls().length) controls().forEach((control, number) => {
      if (control.type === "checkbox") control.checked = kept.set[number];
      else control.value = kept.set[number];
      control.dispatchEvent(new Event(control.tagName === "SELECT" ? "change" : "input", { bubbles: true }));
    });
    scrollTo(0, kept.y);
  }
  addEventListener("pagehide", () => keep({
    y: scrollY,
    open: [...document.querySelectorAll("details")].map((details) => details.open),
    set: controls().map((control) => control.type === "checkbox" ? control.checked : control.value),
  }));
  let touched = 0;
  for (const kind of ["pointerdown", "keydown", "input"]) addEventListener(kind, () => { touched = Date.now(); });
  const loaded = Date.now();
  const look = () => {
    const old_s = Math.max(0, Math.round(Date.now() / 1000 - document.body.dataset.written));
    const stale = old_s > Math.max(10 * live_s, 600);
    age.textContent = `Written ${old_s < 120 ? `${old_s} s` : `${Math.round(old_s / 60)} min`} ago.` +
      (stale ? " Nothing new since: the run has stopped, or hangs, or a step takes long." : "");
    document.querySelector("#live").classList.toggle("stale", stale);
    const busy = !reload.checked || dialog.open || document.hidden || Date.now() - touched < 15000;
    if (!busy && Date.now() - loaded > 1000 * live_s * (stale ? 5 : 1)) location.reload();
  };
  setInterval(look, 1000);
  look();
}
dialog.addEventListener("click", () => dialog.close());
document.querySelector("#opacity")?.addEventListener("input", (event) => {
  document.documentElement.style.setProperty("--opacity", event.target.value / 100);
});
dialog.addEventListener("keydown", (event) => {
  const by = { ArrowLeft: -1, ArrowUp: -1, ArrowRight: 1, ArrowDown: 1 }[event.key];
  if (by) { event.preventDefault(); show(place + by); }
});
