// What moves on a page: pictures that were drawn in advance, and figures that compute. A page works without this script.
(() => {
  const base = document.currentScript.src.replace(/live\.js$/, "");
  const calm = matchMedia("(prefers-reduced-motion: reduce)");

  // An element: make("p", { class: "note" }, "text", child)
  const make = (name, attributes = {}, ...inside) => {
    const element = document.createElement(name);
    for (const [key, value] of Object.entries(attributes)) if (value !== undefined) element.setAttribute(key, value);
    element.append(...inside);
    return element;
  };

  let count = 0;
  const name = () => `live-${++count}`;

  // One control with its label; `changed` is called with the number of its value.
  const makeControl = ({ kind, label, values, start }, changed) => {
    const id = name();
    if (kind === "fixed") return { box: make("p", { class: "fixed" }, `${label}: ${values[0]}`), set() {} };
    if (kind === "list") {
      const list = make("select", { id }, ...values.map(text => make("option", {}, text)));
      list.selectedIndex = start;
      list.onchange = () => changed(list.selectedIndex);
      return { box: make("div", { class: "control" }, make("label", { for: id }, label), list), set(number) { list.selectedIndex = number } };
    }
    if (kind === "tick") {
      const tick = make("input", { id, type: "checkbox" });
      tick.checked = !!start;
      tick.onchange = () => changed(+tick.checked);
      return { box: make("div", { class: "control tick" }, tick, make("label", { for: id }, label)), set(number) { tick.checked = !!number } };
    }
    const slider = make("input", { id, type: "range", min: 0, max: values.length - 1, step: 1 }), value = make("output", { for: id });
    const say = () => { value.textContent = values[slider.value]; slider.setAttribute("aria-valuetext", values[slider.value]) };
    slider.value = start; say();
    slider.oninput = () => { say(); changed(+slider.value) };
    return { box: make("div", { class: "control" }, make("label", { for: id }, label), slider, value), set(number) { slider.value = number; say() } };
  };

  // What a screen reader says when a figure has changed, once it stands still.
  const makeVoice = figure => {
    const voice = make("p", { class: "unseen", "aria-live": "polite" });
    figure.append(voice);
    let waiting;
    return text => { clearTimeout(waiting); waiting = setTimeout(() => { voice.textContent = text }, 400) };
  };

  // Pictures that were drawn in advance. Most are layers that lie on the first; none is loaded before a control moves.
  const moveFrames = figure => {
    const { controls, shown, stem } = JSON.parse(figure.dataset.explore);
    const stage = figure.querySelector(".stage"), first = stage.querySelector("img"), say = makeVoice(figure);
    const chosen = controls.map(control => control.start), files = [];
    const layer = make("canvas", { class: "layer", "aria-hidden": "true", hidden: "" }), text = make("pre", { class: "output", hidden: "" });
    const whole = first && { src: first.src, width: first.getAttribute("width"), height: first.getAttribute("height") };
    const start = Object.assign(new Image(), { src: whole?.src ?? "" });
    if (first) stage.append(layer, text);
    const load = number => files[number] ??= Object.assign(new Image(), { src: `${stem}${number}.png` });
    const loadAll = () => { for (const [number] of Object.values(shown)) if (number >= 0) load(number) };
    let last = 0, idle = true;
    const show = async () => {
      const [number, words, layered] = shown[chosen.join(".")], mine = ++last;
      if (!first) { stage.querySelector("pre").textContent = words; return }
      if (number >= 0) { try { await Promise.all([start.decode(), load(number).decode()]) } catch (e) { return } }
      if (mine !== last) return;
      const instead = number >= 0 && !layered;
      first.src = instead ? files[number].src : whole.src;
      first.width = instead ? files[number].naturalWidth : whole.width;
      first.height = instead ? files[number].naturalHeight : whole.height;
      first.hidden = number < 0; text.hidden = number >= 0; text.textContent = number < 0 ? words : "";
      layer.hidden = !layered;
      if (layered) { // one on the other in the pictures' own pixels, so that no seam shows at another size
        layer.width = whole.width; layer.height = whole.height;
        for (const part of [start, files[number]]) layer.getContext("2d").drawImage(part, 0, 0);
      }
      first.alt = words; figure.dataset.at = chosen.join(".");
      say(words);
    };
    const note = make("p", { class: "note", hidden: "" }, "Here one control moves at a time. In the ",
      make("a", { href: "#open" }, "open notebook"), " all of them move together.");
    const parts = controls.map((control, i) => makeControl(control, number => {
      chosen[i] = number;
      if (!shown[chosen.join(".")]) {
        controls.forEach((other, j) => { if (j !== i) { chosen[j] = other.start; parts[j].set(other.start) } });
        note.hidden = false;
      }
      if (idle) { idle = false; (window.requestIdleCallback ?? setTimeout)(loadAll) }
      show();
    }));
    figure.prepend(make("div", { class: "controls" }, ...parts.map(part => part.box)));
    stage.after(note);
    figure.classList.add("moves");
  };

  // Figures that compute are built when they come near the window, those with an engine after it has been loaded.
  const figures = {}, scripts = {};
  const script = file => scripts[file] ??= new Promise((done, fail) => {
    document.head.append(Object.assign(document.createElement("script"), { src: base + file, onload: done, onerror: fail }));
  });
  const TRAINED = ["rates", "poet", "growth"]; // those with a worker have a script of their own
  window.bookLive = { figures, make, name, makeControl, makeVoice, script, calm };

  const mounted = new WeakSet();
  const mount = async figure => {
    if (mounted.has(figure)) return;
    mounted.add(figure);
    const { live } = figure.dataset;
    try {
      if (live) {
        await script("figures.js");
        if (TRAINED.includes(live)) await script("trained.js");
        await figures[live](figure);
        return;
      }
    } catch (error) {
      figure.append(make("p", { class: "note" }, `This figure doesn't work here: ${error?.message ?? error.type}`));
    }
    if (figure.dataset.explore) moveFrames(figure);
  };
  const near = new IntersectionObserver(all => {
    for (const { target, isIntersecting } of all) if (isIntersecting) { near.unobserve(target); mount(target) }
  }, { rootMargin: "300px" });
  const all = document.querySelectorAll("figure.explore, figure.live");
  for (const figure of all) near.observe(figure);
  window.bookLive.mountAll = () => Promise.all([...all].map(mount)); // for those who don't scroll, as the tests
})();
