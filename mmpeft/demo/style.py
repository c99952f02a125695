"""The demo's style sheet: gradio's colours, light and dark, and one column on a phone."""

CSS = """
.gradio-container {--quiet: var(--neutral-600)}
.dark .gradio-container, .dark.gradio-container {--quiet: var(--neutral-400)}
.gradio-container {width: 100%; max-width: 1240px !important; margin: auto}
#title h1 {font-size: 1.7rem; font-weight: 700; margin: 0.4rem 0 0.2rem; overflow-wrap: anywhere}
#title p {color: var(--quiet); margin: 0; overflow-wrap: anywhere}
#board .turn {padding: 0.2rem 0 1rem}
#board .asked {display: flex; flex-wrap: wrap; gap: 0.2rem 0.6rem; align-items: baseline; margin-bottom: 0.5rem}
#board .asked b {overflow-wrap: anywhere; min-width: 0; white-space: pre-wrap}
#board :is(.number, .truth) {color: var(--quiet); font-size: 0.9rem; overflow-wrap: anywhere}
#board .cards {display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 15rem), 1fr)); gap: 0.7rem}
#board .card {background: var(--block-background-fill); border: 1px solid var(--border-color-primary);
  border-radius: var(--block-radius); padding: 0.6rem 0.8rem; min-width: 0}
#board .card header {display: flex; justify-content: space-between; gap: 0.6rem; font-size: 0.9rem}
#board .card header b {overflow-wrap: anywhere; min-width: 0; color: var(--quiet)}
#board .card header span {color: var(--quiet); white-space: nowrap; font-variant-numeric: tabular-nums}
#board .text {font-size: 1.15rem; font-weight: 600; white-space: pre-wrap; overflow-wrap: anywhere; margin: 0.3rem 0;
  color: var(--body-text-color)}
#board .text:empty {display: none}
#board .writing .text::after {content: "▍"; opacity: 0.6}
#board .writing .text:empty {display: block}
#board .refused {border-color: var(--error-border-color)}
#board .error {color: var(--error-text-color); overflow-wrap: anywhere; margin: 0.3rem 0}
#board .remark {color: var(--quiet); font-size: 0.85rem; overflow-wrap: anywhere; margin: 0.3rem 0 0}
#board .maps {display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 8rem), 1fr)); gap: 0.5rem;
  margin-top: 0.5rem}
#board .maps figure {margin: 0; min-width: 0}
#board .maps img {max-width: 100%; border-radius: var(--radius-sm); margin: 0; display: block}
#board .maps figcaption {color: var(--quiet); font-size: 0.85rem; overflow-wrap: anywhere}
#board .bars {margin-top: 0.4rem}
#board .bar {display: grid; grid-template-columns: minmax(3rem, 2fr) 3fr 3.6rem; gap: 0.5rem; align-items: center;
  font-size: 0.9rem; padding: 0.1rem 0}
#board .choice {overflow-wrap: anywhere; color: var(--body-text-color)}
#board .track {background: var(--neutral-300); border-radius: 99px; height: 0.55rem; overflow: hidden}
.dark #board .track {background: var(--neutral-700)}
#board .track i {display: block; height: 100%; background: var(--color-accent); min-width: 2px}
#board .share {text-align: right; font-variant-numeric: tabular-nums; color: var(--quiet)}
#images .grid-wrap {padding-top: 2.3rem} #images .thumbnail-item {aspect-ratio: 4/3}
:is(#board, .facts) summary {cursor: pointer; font-size: 0.85rem; color: var(--quiet)}
#examples .grid-wrap {min-height: 0; max-height: none; padding-top: 2.3rem}
#examples .thumbnail-item {height: auto; aspect-ratio: auto; display: flex; flex-direction: column}
#examples .thumbnail-item img {width: 100%; aspect-ratio: 4/3; object-fit: contain}
#examples .caption-label {position: static; max-width: 100%; white-space: normal; border: none; box-shadow: none}
.facts table {width: 100%; table-layout: fixed} .facts :is(table, tr, td) {border: none}
.facts td {padding: 0.45rem 0.6rem; border-bottom: 1px solid var(--border-color-primary); overflow-wrap: anywhere}
.facts td:first-child {color: var(--quiet); width: 9rem}
footer .divider {display: none}
@media (max-width: 640px) {
  #examples .grid-container {grid-template-columns: repeat(3, 1fr)}
  .facts td:first-child {width: 6.5rem}
}
"""
