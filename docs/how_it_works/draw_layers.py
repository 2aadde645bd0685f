"""The rooms of the package -> layers.svg, in the order that the layers test holds.

Run:   python docs/how_it_works/draw_layers.py      # after a room was added or moved
"""

import html
import pathlib
import sys

HERE = pathlib.Path(__file__).resolve().parent
ROOMS = {  # what each room turns into what
  "cli, main": "commands: flags -> one call of the package",
  "library": "what a notebook asks for: train, evaluate, load and save a model",
  "planning": "short trials and laws -> the config of a run, with its predicted losses",
  "laws": "measured losses -> formulas that predict others",
  "diagnosis": "a base and texts -> which kind of continual pretraining this is",
  "results": "records of runs -> tables, figures, comparisons, exports",
  "preview": "a config -> what the run would do: memory, transfers, time",
  "training": "batches -> a trained model: the loop, the step, schedules, checkpoints, guards",
  "model": "tokens -> logits and loss; Hugging Face files in and out",
  "vocab": "text -> whether and how to grow a vocabulary",
  "stream": "token stores -> batches, in an order that is a function of the row",
  "store": "text -> token stores",
  "devices": "machines -> processes, a mesh, a table of axes",
  "config, journal, trees, exits, shipped": "keys of a run, records, paths of parameters, exit codes, files in the wheel",
}
WIDTH, ROW, LEFT = 860, 34, 270


def rooms_of(layers: list[list[str]]) -> list[str]:
  """Top first: the rooms of the layers test, whose list begins at the bottom."""
  found: list[str] = []
  for layer in layers:
    for module in layer:
      room = module.split(".")[0]
      if room not in found:
        found.append(room)
  return found[::-1]


def svg() -> str:
  """The picture."""
  height = ROW * len(ROOMS) + 40
  lines = [
    f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}" width="{WIDTH}" height="{height}" '
    'font-family="sans-serif" font-size="13">',
    f'<rect width="{WIDTH}" height="{height}" fill="white"/>',
  ]
  for i, (room, what) in enumerate(ROOMS.items()):
    y = 8 + i * ROW
    lines.append(f'<rect x="8" y="{y}" width="{WIDTH - 60}" height="{ROW - 6}" rx="4" fill="#eef3f8" stroke="#4a6f8f"/>')
    lines.append(f'<text x="18" y="{y + 19}" font-weight="bold" fill="#1c3d57">{html.escape(room)}</text>')
    lines.append(f'<text x="{LEFT}" y="{y + 19}" fill="#222">{html.escape(what)}</text>')
  x, bottom = WIDTH - 26, 8 + len(ROOMS) * ROW - 8
  lines.append(f'<path d="M{x} 14 V{bottom} m-6 -10 l6 10 l6 -10" fill="none" stroke="#4a6f8f" stroke-width="2"/>')
  lines.append(f'<text x="18" y="{height - 12}" fill="#222">A module imports from its own room or from a room below it.</text>')
  return "\n".join([*lines, "</svg>", ""])


def main() -> int:
  """Writes the file; returns the exit code."""
  (HERE / "layers.svg").write_text(svg(), encoding="utf-8")
  return 0


if __name__ == "__main__":
  sys.exit(main())
