"""Text in pictures as the user wrote it: names of categories and files are no formulas."""

from matplotlib.figure import Figure
from matplotlib.text import Text


def without_formulas(figure: Figure) -> Figure:
    """Let all text of a figure show its dollar signs, but for the numbers of logarithmic axes.

    Matplotlib takes what stands between two of them for a formula, and refuses most names as one.
    """
    numbers = {
        id(label)
        for axes in figure.axes
        for axis in (axes.xaxis, axes.yaxis)
        if axis.get_scale() == "log"
        for tick in (*axis.get_major_ticks(), *axis.get_minor_ticks())
        for label in (tick.label1, tick.label2)
    }
    for text in figure.findobj(Text):
        if isinstance(text, Text) and id(text) not in numbers:
            text.set_parse_math(False)
    return figure
