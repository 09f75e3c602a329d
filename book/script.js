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

  const links = new Map([...document.querySelectorAll(".contents a")].map(a => [a.hash.slice(1), a]));
  if (links.size) {
    const heads = [...links.keys()].map(id => document.getElementById(id));
    const mark = () => {
      const here = heads.findLast(h => h.getBoundingClientRect().top < 120);
      for (const [id, a] of links) a.classList.toggle("here", !!here && id === here.id);
    };
    addEventListener("scroll", mark, { passive: true }); mark();
  }

  const book = document.getElementById("book"), current = book.querySelector("[aria-current]");
  if (current && current.offsetTop > book.clientHeight - 80) book.scrollTop = current.offsetTop - book.clientHeight / 2;

  const dialog = document.getElementById("search"), input = dialog.querySelector("input");
  const results = dialog.querySelector(".results"), count = dialog.querySelector(".count"), open = document.getElementById("search-open");
  const load = () => window.bookIndex || new Promise((done, fail) => {
    const script = document.createElement("script");
    script.src = base + "search.js"; script.onload = () => done(window.bookIndex); script.onerror = fail;
    document.head.append(script);
  });
  const excerpt = (text, word) => {
    const at = Math.max(0, text.toLowerCase().indexOf(word) - 50);
    return (at ? "…" : "") + text.slice(at, at + 140).trim() + (text.length > at + 140 ? "…" : "");
  };
  const search = async () => {
    const index = await load(), words = input.value.toLowerCase().split(/\s+/).filter(Boolean);
    const found = !words.length ? [] : index.map(([page, section, url, text]) => {
      const head = (page + " " + section).toLowerCase(), body = text.toLowerCase();
      if (!words.every(w => head.includes(w) || body.includes(w))) return null;
      const score = words.reduce((sum, w) => sum + (section.toLowerCase().includes(w) ? 8 : 0) + (page.toLowerCase().includes(w) ? 4 : 0) + Math.min(4, body.split(w).length - 1), 0);
      return { score, page, section, url, text };
    }).filter(Boolean).sort((a, b) => b.score - a.score);
    count.textContent = words.length ? `${found.length} ${found.length === 1 ? "section" : "sections"}` : "";
    results.replaceChildren(...found.slice(0, 20).map(f => {
      const item = document.createElement("li"), a = document.createElement("a"), title = document.createElement("b"), text = document.createElement("span");
      title.textContent = f.page + (f.section ? " › " + f.section : ""); text.textContent = excerpt(f.text, words[0]);
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
  addEventListener("keydown", event => {
    if (event.key === "/" && !dialog.open && !/^(INPUT|TEXTAREA)$/.test(document.activeElement.tagName)) { event.preventDefault(); open.click() }
  });
})();
