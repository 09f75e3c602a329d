-- What Pandoc does not know of the book: its boxes, its numbered equations, and links that say a page.
-- In Typst each is a function of pdf.typ; in the EPUB the classes say the same to epub.css.

if FORMAT ~= "typst" then
  return {}
end

-- Names of functions stand close to their argument, \! is a sixth of an em, and a symbol has Typst's name of today.
function Math(math)
  local text = pandoc.write(pandoc.Pandoc({ pandoc.Plain({ math }) }), "typst")
  text = text:gsub('"(%a+)" \\%(', 'op("%1")\\('):gsub("#h%(%-1em%)", "#h(-0.167em)"):gsub("dot%.circle", "dot.o")
  return pandoc.RawInline("typst", (text:gsub("%s+$", "")))
end

local function call(name, blocks, label)
  local opening, closing = "#" .. name .. "[", "]"
  if label and label ~= "" then
    closing = closing .. " <" .. label .. ">"
  end
  blocks:insert(1, pandoc.RawBlock("typst", opening))
  blocks:insert(pandoc.RawBlock("typst", closing))
  return blocks
end

function Div(div)
  if div.classes:includes("equation") then
    local number = pandoc.utils.stringify(div.content[#div.content])
    div.content:remove(#div.content)
    return call('equation("' .. number .. '")', div.content, div.identifier)
  end
  if div.classes:includes("exercise") then  -- its title is never the last line of a page
    div.content[1] = pandoc.Div(call("block(sticky: true)", pandoc.Blocks({ div.content[1] })))
  end
  for _, name in ipairs({ "exercise", "hint", "lead", "answer" }) do
    if div.classes:includes(name) then
      return call(name, div.content, div.identifier)
    end
  end
end

function Span(span)
  if span.classes:includes("kind") then
    return pandoc.Inlines({ pandoc.RawInline("typst", "#kind["), pandoc.Span(span.content), pandoc.RawInline("typst", "]") })
  end
end

function Link(link)
  for _, name in ipairs({ "solution", "term" }) do
    if link.classes:includes(name) then
      local inlines = link.content:clone()
      inlines:insert(1, pandoc.RawInline("typst", "#" .. name .. "(<" .. link.target:sub(2) .. ">)["))
      inlines:insert(pandoc.RawInline("typst", "]"))
      return inlines
    end
  end
end
