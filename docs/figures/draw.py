"""Draws the figures of docs/methods.md:  python docs/figures/draw.py

A figure is a list of boxes, arrows and grids. Blue is what comes from a picture, red what comes from a text, grey what
is not trained, green the loss.
"""

import pathlib

COLORS = {
    "image": ("#dbe9f6", "#2b6ca3"),
    "text": ("#fbe3da", "#b5532f"),
    "frozen": ("#e6e6e6", "#666666"),
    "loss": ("#dff0e3", "#2f7d4b"),
    "both": ("#ece2f3", "#6d4a94"),
}
WIDTH, HEIGHT = 480, 130


def box(x, y, label, kind, w=78, h=30):
    fill, line = COLORS[kind]
    lines = label.split("\n")
    words = "".join(
        f'<text x="{x + w / 2:g}" y="{y + h / 2 + 4 + 13 * (i - (len(lines) - 1) / 2):g}">{line_}</text>'
        for i, line_ in enumerate(lines)
    )
    return f'<rect x="{x}" y="{y}" width="{w}" height="{h}" rx="4" fill="{fill}" stroke="{line}"/>{words}'


def arrow(x1, y1, x2, y2, dashed=False):
    dash = ' stroke-dasharray="4 3"' if dashed else ""
    return f'<path d="M{x1} {y1} L{x2} {y2}" stroke="#555" fill="none" marker-end="url(#tip)"{dash}/>'


def grid(x, y, cells, size=15):
    """A matrix of similarities; `cells` holds a share of green in [0, 1] for each, row by row."""
    squares = []
    for row, values in enumerate(cells):
        for column, value in enumerate(values):
            place = f'x="{x + column * size}" y="{y + row * size}" width="{size}" height="{size}"'
            squares.append(f'<rect {place} fill="#fff" stroke="#999"/>')
            squares.append(f'<rect {place} fill="#2f7d4b" fill-opacity="{value:g}" stroke="none"/>')
    return "".join(squares)


def note(x, y, words):
    return f'<text x="{x}" y="{y}" class="note">{words}</text>'


EYE = [[float(i == j) for j in range(4)] for i in range(4)]
SOFT = [[0.9 if i == j else 0.35 if abs(i - j) == 1 else 0.0 for j in range(4)] for i in range(4)]
LABELS = [[1, 1, 0, 0], [1, 1, 0, 0], [0, 0, 1, 0], [0, 0, 0, 1]]
MIXED = [[0.75 if i == j else 0.3 if i + j == 3 else 0.0 for j in range(4)] for i in range(4)]
SIGMOID = [[0.95 if i == j else 0.12 for j in range(4)] for i in range(4)]
WEIGHTED = [[w if i == j else 0.0 for j in range(4)] for i, w in enumerate((1.0, 0.25, 0.7, 0.1))]


def towers(cells=EYE, image="picture", text="text", frozen=(), words=""):
    """Two towers and the matrix of their similarities."""
    parts = [box(8, 20, image, "image"), box(8, 80, text, "text")]
    parts += [box(118, 20, "image tower", "frozen" if "image" in frozen else "image", 92)]
    parts += [box(118, 80, "text tower", "frozen" if "text" in frozen else "text", 92)]
    parts += [arrow(86, 35, 116, 35), arrow(86, 95, 116, 95), arrow(210, 35, 246, 52), arrow(210, 95, 246, 78)]
    return [*parts, grid(252, 35, cells), note(330, 68, words)]


FIGURES = {
    "clip": towers(words="each pair against the batch"),
    "siglip": towers(SIGMOID, words="each cell: yes or no"),
    "lit": towers(frozen=("image",), words="image tower is locked"),
    "flip": [*towers(image="", words="half of the patches")]
    + ["".join(grid(14 + 17 * i, 22, [[0.7 * ((i + 1) % 2)], [0.7 * (i % 2)]], 13) for i in range(4))],
    "align": towers(SIGMOID, text="alt-text", words="noisy, by the billion"),
    "clippo": [
        box(8, 20, "picture", "image"),
        box(8, 80, "text, drawn", "text"),
        box(126, 50, "one tower", "both", 84),
        arrow(86, 35, 124, 58),
        arrow(86, 95, 124, 72),
        arrow(210, 65, 248, 65),
        grid(252, 35, EYE),
        note(330, 68, "no tokenizer"),
    ],
    "oner": [
        box(8, 8, "picture", "image"),
        box(8, 50, "both", "both"),
        box(8, 92, "text", "text"),
        box(126, 50, "one tower", "both", 84),
        *(arrow(86, y, 124, 65 + (y - 65) // 4) for y in (23, 65, 107)),
        box(262, 20, "student", "both"),
        box(262, 80, "average of\nthe student", "frozen", 78, 36),
        arrow(210, 60, 260, 38),
        arrow(210, 72, 260, 94),
        arrow(300, 50, 300, 78, True),
        note(352, 68, "contrast"),
    ],
    "declip": [
        box(8, 4, "view 1", "image", 60, 26),
        box(8, 36, "view 2", "image", 60, 26),
        box(8, 70, "caption", "text", 60, 26),
        box(8, 102, "changed", "text", 60, 26),
        box(104, 18, "image tower", "image", 92),
        box(104, 84, "text tower", "text", 92),
        *(arrow(68, y, 102, t) for y, t in ((17, 28), (49, 38), (83, 94), (115, 104))),
        grid(236, 6, EYE, 11),
        grid(236, 54, EYE, 11),
        box(300, 4, "views agree", "loss", 130, 26),
        box(300, 50, "nearest caption", "loss", 130, 26),
        box(300, 96, "masked words", "loss", 130, 26),
        arrow(196, 30, 232, 26),
        arrow(196, 96, 232, 80),
        arrow(284, 28, 298, 18),
        arrow(284, 76, 298, 64),
        arrow(196, 106, 298, 110),
    ],
    "otter": [
        *towers(SOFT, words=""),
        box(330, 20, "averaged\ntowers", "frozen", 100, 36),
        box(330, 78, "optimal\ntransport", "loss", 100, 36),
        arrow(380, 56, 380, 76),
        arrow(328, 94, 314, 84),
    ],
    "zerovl": towers(MIXED, image="mixed pair", text="mixed pair", words="a batch from one source"),
    "unicl": towers(LABELS, text="text or class", words="a class is one block"),
    "filip": [
        grid(14, 22, [[0.1, 0.7, 0.1], [0.1, 0.1, 0.1], [0.7, 0.1, 0.1]], 24),
        *(box(130 + 74 * i, 90, word, "text", 66, 28) for i, word in enumerate(("a", "cat", "on a", "mat"))),
        arrow(60, 34, 234, 88),
        arrow(38, 86, 380, 90, True),
        note(150, 30, "each patch finds its best word,"),
        note(150, 50, "each word its best patch"),
    ],
    "pyramidclip": [
        *(box(8, 6 + 42 * i, name, "image", 96) for i, name in enumerate(("whole picture", "crop", "regions"))),
        *(box(330, 6 + 42 * i, name, "text", 96) for i, name in enumerate(("summary", "caption", "tags"))),
        arrow(104, 21, 328, 21),
        arrow(104, 63, 328, 63),
        *(arrow(104, a, 328, b, True) for a, b in ((24, 103), (105, 26), (67, 105), (107, 67))),
    ],
    "laclip": [
        *(box(8, 66 + 16 * i, "", "text", 78, 24) for i in range(3)),
        *towers(text="one of many", words="rewrites by a"),
        note(330, 84, "language model"),
    ],
    "alip": [
        box(8, 8, "picture", "image"),
        box(8, 52, "synthetic", "text", 78, 28),
        box(8, 94, "alt-text", "text", 78, 28),
        *towers(WEIGHTED, words="weights by agreement")[2:4],
        arrow(86, 23, 116, 33),
        arrow(86, 68, 116, 88),
        arrow(86, 106, 116, 98),
        *towers(WEIGHTED, words="weights by agreement")[6:],
    ],
    "raclip": [
        *towers(words=""),
        box(330, 20, "similar\npairs", "frozen", 100, 36),
        arrow(328, 30, 212, 28),
        note(330, 84, "looked up by a"),
        note(330, 100, "frozen encoder"),
    ],
}


def svg(parts):
    tip = '<marker id="tip" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="7" markerHeight="7" orient="auto">'
    style = "text{font:12px sans-serif;text-anchor:middle;fill:#222}.note{text-anchor:start;fill:#555}"
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" width="{WIDTH}" height="{HEIGHT}">'
        f'<style>{style}</style><defs>{tip}<path d="M0 0 L8 4 L0 8 z" fill="#555"/></marker></defs>'
        f'<rect width="{WIDTH}" height="{HEIGHT}" fill="#ffffff"/>{"".join(parts)}</svg>\n'
    )


if __name__ == "__main__":
    for name, parts in FIGURES.items():
        (pathlib.Path(__file__).parent / f"{name}.svg").write_text(svg(parts))
