"""What the built-in scenes are labelled: digits, or compositions of a colour, a digit and a place."""

SCENE_LABELS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
# The digit that a digit brings along with probability `cooccurrence`. Neighbours are about equally frequent in a long
# tail over 0..9, so that the co-occurrence knob leaves the imbalance knob nearly as it was set.
PARTNER = (1, 0, 3, 2, 5, 4, 7, 6, 9, 8)
# What `colours` may name: far apart, and brighter than the dark grey that lies under them.
COLOURS = {
    "red": (230, 50, 50),
    "green": (50, 190, 60),
    "blue": (60, 100, 250),
    "yellow": (240, 225, 50),
    "cyan": (50, 210, 220),
    "white": (240, 240, 240),
    "orange": (245, 140, 30),
    "purple": (160, 60, 230),
}
# Names of rows and columns, by how many `places` there are on a side.
ROWS = {
    1: ("",),
    2: ("top", "bottom"),
    3: ("top", "middle", "bottom"),
    4: ("top", "upper", "lower", "bottom"),
    5: ("top", "upper", "middle", "lower", "bottom"),
}
COLUMNS = {
    1: ("",),
    2: ("left", "right"),
    3: ("left", "centre", "right"),
    4: ("far left", "left", "right", "far right"),
    5: ("far left", "left", "centre", "right", "far right"),
}


def scene_labels(colours: int = 0, places: int = 1) -> tuple[str, ...]:
    """The label names of scenes with these settings: `SCENE_LABELS`, or compositions such as "red seven top left", by
    digit, then colour, row and column."""
    named = list(COLOURS)[:colours] or [""]
    parts = (
        (colour, digit, row, column)
        for digit in SCENE_LABELS
        for colour in named
        for row in ROWS[places]
        for column in COLUMNS[places]
    )
    return tuple(" ".join(filter(None, words)) for words in parts)
