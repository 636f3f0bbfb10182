"""The style sheet of the report: light or dark as the reader's system is, narrow windows included."""

# ruff: noqa: E501
CSS = """
:root{--paper:#fbfaf7;--panel:#fff;--ink:#1d2433;--muted:#6b7385;--line:#e3e1da;--accent:#2457c5;
--heat:0;--good:#16805a;--bad:#c2412d;--c1:#2457c5;--c2:#7a4fd0;--c3:#b0309a;--c4:#16805a;--c5:#d07a14;--c6:#0d8fa8}
@media (prefers-color-scheme:dark){:root{--paper:#12151c;--panel:#1a1f29;--ink:#e8eaf0;--muted:#98a1b3;--line:#2d3442;
--accent:#7ea6ff;--good:#3fc08e;--bad:#f07c68;--c1:#7ea6ff;--c2:#b394ff;--c3:#ee7fd8;--c4:#3fc08e;--c5:#f2a94e;--c6:#4cc9e0}}
*{box-sizing:border-box}
body{margin:0;background:var(--paper);color:var(--ink);font:15px/1.55 system-ui,-apple-system,"Segoe UI",Roboto,sans-serif;
-webkit-text-size-adjust:100%}
main{max-width:1120px;margin:0 auto;padding:40px 24px 80px}
h1{font-size:clamp(26px,4.4vw,40px);line-height:1.15;letter-spacing:-.02em;margin:0 0 12px}
h2{font-size:21px;letter-spacing:-.01em;margin:0 0 4px}
section{margin-top:52px}
section>p,.lead{color:var(--muted);max-width:76ch;margin:0 0 16px}
.lead{font-size:17px}
small{display:block;color:var(--muted);font-size:11.5px;font-weight:400;line-height:1.35}
code{font-family:ui-monospace,SFMono-Regular,Menlo,Consolas,monospace;font-size:.9em;overflow-wrap:anywhere}
.cards{display:grid;grid-template-columns:repeat(auto-fit,minmax(210px,1fr));gap:14px;margin-top:24px}
.card{background:var(--panel);border:1px solid var(--line);border-radius:12px;padding:16px 18px}
.card b{display:block;font-size:30px;letter-spacing:-.02em;line-height:1.2;font-variant-numeric:tabular-nums}
.card span{color:var(--muted);font-size:13px;display:block;line-height:1.4;margin-top:4px}
.scroll{overflow-x:auto;background:var(--panel);border:1px solid var(--line);border-radius:12px}
table{border-collapse:collapse;width:100%;font-variant-numeric:tabular-nums}
th,td{padding:8px 12px;text-align:right;white-space:nowrap;border-top:1px solid var(--line)}
thead th{border-top:0;font-size:12.5px;font-weight:600;color:var(--muted);vertical-align:bottom}
th:first-child{text-align:left;position:sticky;left:0;background:var(--panel);font-weight:600;z-index:1}
th:first-child small{white-space:normal;min-width:150px;max-width:230px}
.heat td[style]{background:color-mix(in srgb,var(--good) calc(var(--heat)*58%),var(--panel))}
.heat td,.change td{text-align:center}.heat thead th:not(:first-child),.change thead th:not(:first-child){text-align:center}
.heat td b{font-weight:650}
.heat td small{color:color-mix(in srgb,var(--ink) 62%,transparent)}
.blind{color:var(--muted)}
.mean th,.mean td{border-top:2px solid var(--ink)}
.dot{display:inline-block;width:5px;height:5px;border-radius:50%;background:var(--ink);opacity:.55;margin-left:5px;vertical-align:middle}
.change .gain{background:color-mix(in srgb,var(--good) calc(12% + var(--heat)*55%),var(--panel));font-weight:600}
.change .loss{background:color-mix(in srgb,var(--bad) calc(12% + var(--heat)*55%),var(--panel));font-weight:600}
.change .same{color:var(--muted)}
.tabs input{position:absolute;opacity:0}
.tabs label{display:inline-block;padding:5px 14px;margin:0 6px 10px 0;border:1px solid var(--line);border-radius:999px;
font-size:13px;cursor:pointer;background:var(--panel)}
.tabs input:checked+label{background:var(--ink);color:var(--paper);border-color:var(--ink)}
.tabs input:focus-visible+label{outline:2px solid var(--accent);outline-offset:2px}
.tab{display:none}
#t1:checked~.tab:nth-of-type(1),#t2:checked~.tab:nth-of-type(2){display:block}
.interval{width:220px;height:26px;display:block;margin-left:auto}
.interval line{stroke-width:3;stroke-linecap:round}.interval .zero{stroke:var(--line);stroke-width:1}
.charts{display:grid;grid-template-columns:repeat(auto-fit,minmax(310px,1fr));gap:14px}
.chart{margin:0;background:var(--panel);border:1px solid var(--line);border-radius:12px;padding:12px 14px 6px}
.chart figcaption{display:flex;flex-wrap:wrap;gap:2px 14px;font-size:13px;line-height:1.4;min-height:38px;align-content:flex-start}
.chart figcaption b{font-weight:600;flex-basis:100%}
.legend span{margin-right:12px;color:var(--muted);font-size:12px}.legend i{display:inline-block;width:10px;height:3px;
border-radius:2px;margin-right:5px;vertical-align:middle}
.chart svg{display:block;width:100%;height:auto}
.grid{stroke:var(--line);stroke-width:1}.tick{fill:var(--muted);font-size:10.5px;font-family:inherit}
polyline{fill:none;stroke-linejoin:round}.raw{stroke-width:1;opacity:.28}.curve{stroke-width:2}
.examples{display:grid;grid-template-columns:repeat(auto-fill,minmax(245px,1fr));gap:14px}
article{background:var(--panel);border:1px solid var(--line);border-radius:12px;overflow:hidden;padding-bottom:10px}
.picture{background:color-mix(in srgb,var(--ink) 6%,var(--panel));height:150px;display:grid;place-items:center;color:var(--muted)}
.picture img{image-rendering:pixelated;height:128px;max-width:92%;object-fit:contain}
article p{margin:10px 14px 0;font-weight:600}
article .truth{margin-top:2px;font-weight:400;color:var(--muted);font-size:13px}
article ul{list-style:none;margin:8px 14px 0;padding:0;font-size:13px}
article li{display:flex;gap:8px;justify-content:space-between;padding:3px 0;border-top:1px solid var(--line)}
article li span{color:var(--muted);white-space:nowrap}article li code{text-align:right}
.right code::after{content:" ✓";color:var(--good);font-weight:700}.wrong code::after{content:" ✗";color:var(--bad);font-weight:700}
.bar{display:flex;height:18px;border-radius:9px;overflow:hidden;margin:0 0 14px;background:var(--line)}.bar i{display:block}
.key{display:inline-block;width:10px;height:10px;border-radius:3px;margin-right:8px}
.facts th{vertical-align:top;width:170px;background:none}.facts td{text-align:left;white-space:normal}
@media (max-width:640px){main{padding:24px 14px 60px}th,td{padding:7px 9px}.facts th{width:auto;white-space:normal}
.heat th:first-child small{display:none}}
"""
