"""How the page of ``drumline bench eplb`` looks, in light and dark. Diverging colours are d0 to d8, sequential s0 to
s8, the good end last."""

STYLE = """
:root { color-scheme: light dark; --paper: #fff; --ink: #1d2733; --muted: #5b6875; --faint: #e7ebf0; --card: #f6f8fa;
  --after: #2463b0; --before: #d9822b; --start: #8b97a4; --bar: #3f6fb5; --limit: #c92a2a;
  --d0: #2166ac; --d1: #4a8bc2; --d2: #86b6d8; --d3: #bfd8ea; --d4: #f2f2f0; --d5: #f8d5bd; --d6: #eea57f;
  --d7: #d66a50; --d8: #b2182b;
  --s0: #7f2704; --s1: #a63f0a; --s2: #cc5c15; --s3: #e8833a; --s4: #f7ab6b; --s5: #f4d9a8; --s6: #c6dfb4;
  --s7: #7fc08e; --s8: #2f9a63; }
@media (prefers-color-scheme: dark) { :root { --paper: #12171d; --ink: #e6ebf0; --muted: #9aa7b4; --faint: #2a333d;
  --card: #1b222a; --after: #6fb0ff; --before: #f0a35a; --start: #77838f; --bar: #5b93dc; --limit: #ff7b72;
  --d0: #6cb2f5; --d1: #4b8fce; --d2: #376c9f; --d3: #294b6b; --d4: #2b3138; --d5: #61412f; --d6: #9c5a36;
  --d7: #d4703f; --d8: #ff8f5c;
  --s0: #ff8a4c; --s1: #e57039; --s2: #c15c2d; --s3: #9a4c28; --s4: #744126; --s5: #4f4630; --s6: #2f5a41;
  --s7: #2f7a54; --s8: #37a86f; } }
* { box-sizing: border-box; }
body { margin: 0; background: var(--paper); color: var(--ink);
  font: 15px/1.5 Inter, 'Segoe UI', 'Helvetica Neue', Helvetica, Arial, 'DejaVu Sans', sans-serif; }
main { max-width: 1080px; margin: 0 auto; padding: 24px 16px 48px; }
h1 { font-size: 26px; line-height: 1.2; margin: 0 0 8px; }
h2 { font-size: 19px; margin: 36px 0 2px; }
h3 { font-size: 13px; font-weight: 600; margin: 8px 0 4px 52px; color: var(--muted); }
p { margin: 0; max-width: 76ch; color: var(--muted); }
.lead { color: var(--ink); }
.tiles { display: grid; grid-template-columns: repeat(auto-fit, minmax(150px, 1fr)); gap: 10px; margin: 20px 0 0; }
.tiles div { background: var(--card); border: 1px solid var(--faint); border-radius: 10px; padding: 10px 12px; }
.tiles b { display: block; font-size: 21px; line-height: 1.25; }
.tiles span { font-size: 12.5px; line-height: 1.35; color: var(--muted); display: block; }
.legend { font-size: 13px; margin: 6px 0 8px; min-height: 1em; }
.key { display: inline-block; margin-right: 18px; }
.key::before { content: ""; display: inline-block; width: 18px; height: 3px; border-radius: 2px; margin-right: 6px;
  vertical-align: middle; background: currentColor; }
.key.after::before { background: var(--after); } .key.before::before { background: var(--before); }
.key.start::before { background: var(--start); } .key.limit::before { background: var(--limit); }
.scale svg { width: 126px; height: 12px; vertical-align: middle; margin: 0 4px; border-radius: 3px; }
.plot { position: relative; padding: 0 6px 22px 52px; }
.plot > svg { display: block; width: 100%; height: 230px; overflow: visible;
  background: var(--card); border-radius: 4px; }
.panel .plot > svg { height: 260px; shape-rendering: crispEdges; }
.y { position: absolute; left: 0; top: 0; bottom: 22px; width: 46px; font-size: 11.5px; color: var(--muted); }
.y span { position: absolute; right: 0; transform: translateY(-50%); white-space: nowrap; }
.x { position: relative; height: 0; font-size: 11.5px; color: var(--muted); }
.x span { position: absolute; top: 3px; transform: translateX(-50%); }
.panels { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(300px, 100%), 1fr)); gap: 8px 16px; }
.grid { stroke: var(--faint); stroke-width: 1; fill: none; vector-effect: non-scaling-stroke; }
.line { fill: none; stroke-width: 2; stroke-linejoin: round; vector-effect: non-scaling-stroke; }
.dots { fill: none; stroke-width: 6; stroke-linecap: round; vector-effect: non-scaling-stroke; }
path.after { stroke: var(--after); } path.before { stroke: var(--before); stroke-dasharray: 5 4; }
path.dots.before { stroke-dasharray: none; } path.start { stroke: var(--start); }
path.limit { stroke: var(--limit); stroke-width: 1.5; stroke-dasharray: 6 4; }
.bar { fill: var(--bar); }
.hint { fill: transparent; } .hint:hover { fill: var(--ink); fill-opacity: 0.1; }
.d0 { fill: var(--d0); } .d1 { fill: var(--d1); } .d2 { fill: var(--d2); } .d3 { fill: var(--d3); }
.d4 { fill: var(--d4); } .d5 { fill: var(--d5); } .d6 { fill: var(--d6); } .d7 { fill: var(--d7); }
.d8 { fill: var(--d8); }
.s0 { fill: var(--s0); } .s1 { fill: var(--s1); } .s2 { fill: var(--s2); } .s3 { fill: var(--s3); }
.s4 { fill: var(--s4); } .s5 { fill: var(--s5); } .s6 { fill: var(--s6); } .s7 { fill: var(--s7); }
.s8 { fill: var(--s8); }
details { margin-top: 36px; } summary { font-size: 19px; font-weight: 600; cursor: pointer; }
.tables { overflow-x: auto; }
table { border-collapse: collapse; font-size: 13px; margin-top: 8px; }
th, td { padding: 4px 14px 4px 0; text-align: left; border-bottom: 1px solid var(--faint); vertical-align: top; }
th { white-space: nowrap; } td.n, th.n { text-align: right; white-space: nowrap; }
td:last-child { min-width: 260px; }
"""
