"""Share of pages that are decoded into other characters than their author wrote.

    python -m benchmarks.charsets [PAGES]

Pages of the Universal Declaration of Human Rights ($GRISTMILL_DATA), so many per encoding, kind of
declaration and damage: none, a title cut in the middle of a character, a stray byte in the text. A
page counts as garbled if more than the one damaged paragraph differs.
"""

import sys
from itertools import product
from typing import get_args

from tests.support.charset_pages import ENCODINGS, Damage, Declared, pages


def main(number: int) -> None:
    """Print a line per encoding: garbled pages per declaration, over all damages."""
    kinds = list(product(get_args(Declared), get_args(Damage)))
    totals = dict.fromkeys(kinds, 0)
    print(f"garbled of {number} pages per encoding, declaration and damage")
    for label, codec, languages in ENCODINGS:
        garbled = {}
        for declared, damage in kinds:
            made = pages(label, codec, languages, declared=declared, damage=damage, number=number)
            garbled[declared, damage] = sum(page.garbled() for page in made)
            totals[declared, damage] += garbled[declared, damage]
        if any(garbled.values()):
            print(f"{label:15}", {" ".join(k): n for k, n in garbled.items() if n})
    for kind, n in totals.items():
        print(
            f"{' '.join(kind):20} {n} of {number * len(ENCODINGS)} ({n / number / len(ENCODINGS):.2%})"
        )


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 60)
