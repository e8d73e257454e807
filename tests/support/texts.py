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


# Darwin, On the Origin of Species (1859; public domain)
DARWIN = """\
When on board H.M.S. Beagle, as naturalist, I was much struck with certain facts in the distribution of the inhabitants.

These facts seemed to me to throw some light on the origin of species, that mystery of mysteries.

On my return home, it occurred to me that something might perhaps be made out on this question.

After five years' work I allowed myself to speculate on the subject, and drew up some short notes.

I hope that I may be excused for entering on these personal details, as I give them to show that I have not been hasty.

My work is now nearly finished, but as it will take me two or three more years to complete it, and as my
health is far from strong, I have been urged to publish.

This Abstract, which I now publish, must necessarily be imperfect.

I cannot here give references and authorities for my several statements.
"""
