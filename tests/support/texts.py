"""Texts to try the heuristics on: anything, nasty, and repetitive."""

from hypothesis import strategies as st

NASTY = [
    "",
    " ",
    "\n",
    "\n\n\n",
    "\x00",
    "\ud800",
    "lone \udfff surrogate. \ud83d\n\ud83d",
    "a\u0300\u0301\u200d\ufeff",
    "\u2028\u2029\x85\x1c\x0b\x0c",
    "#",
    "...",
    "… … …\n…",
    "•\n-\n•",
    "{",
    "lorem ipsum LOREM IPSUM",
    "a",
    "a a a a a a a a a a a a",
    "İ javaScript İstanbul uses cookies",
    "[1] [2] [3]",
    "a b [edit] c[12].",
    "你好。你好吗？",
    "مرحبا؟ نعم۔",
    "x" * 1001 + " y z",
    "\r\na b c\r\n\r\na b c\r\n",
    "👩‍👩‍👧 ok 👍",
]

PROSE = """The mill stands at the end of the valley, and the river that drives it has never run dry.
People come from far away to see how the old stones turn.
They have to climb the path with their bags of grain, and most of them rest halfway.
Inside, the air is white with flour. The miller knows every sound that the wheel can make.

When the frost comes, he listens closely, because ice is the one thing to be afraid of.
His daughter keeps the books; she wants to replace the wheel with a turbine, but nobody has found the money yet.
Visitors leave with warm bread."""

_WORD = st.sampled_from(
    [
        "a",
        "b",
        "the",
        "mill",
        "wheel",
        ",",
        ".",
        "...",
        "U.S.",
        "don't",
        "[1]",
        "{",
        "javascript",
        "-",
    ]
)
_LINE = st.lists(_WORD, max_size=8).map(" ".join)
REPETITIVE = st.lists(
    _LINE | st.sampled_from(["the wheel turns round.", "a b c d e f g h i j k l"]), max_size=20
).map("\n".join)
TEXTS = st.text() | st.sampled_from(NASTY) | REPETITIVE
