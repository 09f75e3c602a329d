// What needs a script: the dark mode switch, copy buttons, search, and where you are in the contents. All else works without.
(() => {
  const root = document.documentElement;
  const base = document.currentScript.dataset.root;

  const toggle = document.getElementById("theme");
  const dark = () => (root.dataset.theme || (matchMedia("(prefers-color-scheme: dark)").matches ? "dark" : "light")) === "dark";
  const say = () => toggle.setAttribute("aria-pressed", dark());
  toggle.hidden = false;
  toggle.onclick = () => {
    root.dataset.theme = dark() ? "light" : "dark";
    try { localStorage.setItem("theme", root.dataset.theme) } catch (e) { }
    say();
  };
  say();

  for (const pre of document.querySelectorAll("pre.code")) {
    let box = pre.parentElement;
    if (!box.matches(".cell")) { box = document.createElement("div"); box.className = "block"; pre.replaceWith(box); box.append(pre) }
    const button = document.createElement("button");
    button.className = "copy"; button.textContent = "Copy";
    button.onclick = async () => {
      const text = pre.textContent;
      try { await navigator.clipboard.writeText(text); button.textContent = "Copied" }
      catch (e) { getSelection().selectAllChildren(pre); button.textContent = document.execCommand("copy") ? "Copied" : "Selected" }
      setTimeout(() => { button.textContent = "Copy" }, 1500);
    };
    box.append(button);
  }

  // Only boxes that scroll take part in the tab order.
  const fit = new ResizeObserver(all => { for (const { target: box } of all) box.scrollWidth > box.clientWidth ? box.tabIndex = 0 : box.removeAttribute("tabindex") });
  for (const box of document.querySelectorAll("pre[tabindex], .scroll, .math.block")) fit.observe(box);

  const links = new Map([...document.querySelectorAll(".contents a")].map(a => [decodeURIComponent(a.hash.slice(1)), a]));
  if (links.size) {
    const heads = [...links.keys()].map(id => document.getElementById(id));
    const mark = () => {
      const here = heads.findLast(h => h.getBoundingClientRect().top < 120);
      for (const [id, a] of links) a.classList.toggle("here", !!here && id === here.id);
    };
    addEventListener("scroll", mark, { passive: true }); mark();
  }

  // The list of chapters, where it is a menu: Escape or a tap beside it closes it.
  const book = document.getElementById("book"), isMenu = () => location.hash === "#book";
  addEventListener("keydown", event => { if (event.key === "Escape" && isMenu()) location.replace("#main") });
  document.addEventListener("click", event => {
    if (isMenu() && !event.target.closest("#book, .menu")) { event.preventDefault(); location.replace("#main") }
  }, true);

  // A word of the glossary says what it means where it stands, when it is touched or reached by a key; again, and it leads there.
  const note = document.createElement("p");
  note.className = "meaning"; note.id = "meaning"; note.hidden = true; note.setAttribute("role", "tooltip");
  document.body.append(note);
  let meant;
  const forget = () => { note.hidden = true; meant?.removeAttribute("aria-describedby"); meant = null };
  const explain = term => {
    forget();
    meant = term; note.textContent = term.dataset.meaning; note.hidden = false; term.setAttribute("aria-describedby", "meaning");
    const at = term.getBoundingClientRect(), width = note.offsetWidth;
    note.style.left = Math.max(8, Math.min(at.left, document.documentElement.clientWidth - width - 8)) + scrollX + "px";
    note.style.top = at.bottom + scrollY + 6 + "px";
  };
  for (const term of document.querySelectorAll("a.term[title]")) {
    term.dataset.meaning = term.title;
    let touched = false;
    term.addEventListener("pointerdown", event => { touched = event.pointerType !== "mouse" && meant !== term });
    term.addEventListener("focus", () => { term.removeAttribute("title"); explain(term) });
    term.addEventListener("blur", () => { term.title = term.dataset.meaning; forget() });
    term.addEventListener("click", event => { if (touched) { event.preventDefault(); explain(term) } });
  }
  addEventListener("keydown", event => { if (event.key === "Escape") forget() });

  const current = book.querySelector("[aria-current]");
  if (current && current.offsetTop > book.clientHeight - 80) book.scrollTop = current.offsetTop - book.clientHeight / 2;

  const dialog = document.getElementById("search"), input = dialog.querySelector("input");
  const results = dialog.querySelector(".results"), count = dialog.querySelector(".count"), open = document.getElementById("search-open");
  let loading;
  const load = () => loading ??= new Promise((done, fail) => {
    const script = document.createElement("script");
    script.src = base + "search.js"; script.onload = () => done(window.bookSearch); script.onerror = fail;
    document.head.append(script);
  });
  const excerpt = (text, words) => {
    const low = text.toLowerCase(), first = words.map(w => low.indexOf(w)).filter(at => at >= 0);
    const at = first.length ? Math.max(0, Math.min(...first) - 50) : 0;
    return (at ? "…" : "") + text.slice(at, at + 140).trim() + (text.length > at + 140 ? "…" : "");
  };
  const search = async () => {
    await load();
    const question = input.value.trim(), found = question ? bookSearch(question) : [];
    count.textContent = !question ? "" : found.length ? `${found.length} ${found.length === 1 ? "section" : "sections"}` : "Nothing found: try another word for it.";
    results.replaceChildren(...found.slice(0, 20).map(f => {
      const item = document.createElement("li"), a = document.createElement("a"), title = document.createElement("b"), text = document.createElement("span");
      title.textContent = f.page + (f.section ? " › " + f.section : ""); text.textContent = excerpt(f.text, f.terms);
      a.href = base + f.url; a.onclick = () => dialog.close(); a.append(title, text); item.append(a);
      return item;
    }));
  };
  open.hidden = false;
  open.onclick = () => { dialog.showModal(); load(); input.select() };
  input.oninput = search;
  input.onkeydown = event => {
    if (event.key === "Enter") { event.preventDefault(); results.querySelector("a")?.click() }
  };
  dialog.onkeydown = event => {
    const step = { ArrowDown: 1, ArrowUp: -1 }[event.key];
    if (!step) return;
    event.preventDefault();
    const stops = [input, ...results.querySelectorAll("a")], next = stops.indexOf(document.activeElement) + step;
    stops[Math.min(Math.max(next, 0), stops.length - 1)].focus();
  };
  addEventListener("keydown", event => {
    if (event.key === "/" && !dialog.open && !/^(INPUT|TEXTAREA)$/.test(document.activeElement.tagName)) { event.preventDefault(); open.click() }
  });
})();
