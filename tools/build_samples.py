"""Make the bundled sample pages: HTML of freely licensed Debian documentation packages, wrapped
into WARC files.

    python tools/build_samples.py [--out samples] [--debs FOLDER]

Needs Debian's `apt-get` and `dpkg`; only the standard library otherwise. The page bodies are the
packages' own bytes; the HTTP envelope and the addresses are rebuilt (each file's warcinfo record
says so). Two runs give the same bytes: the packages are pinned by sha256, pages are ranked by a
hash of their name, dates are the packages' own, and gzip carries no time. Prints the table of
samples/README.md; the licences are in samples/LICENSES.md.
"""

import argparse
import base64
import hashlib
import subprocess
import tempfile
import uuid
import zlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from email.utils import format_datetime
from pathlib import Path
from typing import NamedTuple

MAX_PAGE_BYTES = (
    500_000  # the largest pages are indexes of up to 2.5 MB: minutes of extraction for no text
)
CONTENT_TYPES = {
    ".css": "text/css",
    ".gif": "image/gif",
    ".png": "image/png",
    ".svg": "image/svg+xml",
    ".txt": "text/plain",
    ".js": "application/javascript",
}
CRLF = "\r\n"


@dataclass(frozen=True)
class Package:
    """One Debian package at one version, and where its pages are published."""

    name: str
    version: str
    sha256: str
    root: str
    base_url: str


@dataclass(frozen=True)
class Sample:
    """One output file: how many pages to take per pattern, in order; a page is taken once.

    `links` are patterns of which only symbolic links count: one page served under a second address,
    byte for byte.
    """

    file: str
    package: Package
    content_type: str
    pages: Mapping[str, int]
    links: Mapping[str, int] = field(default_factory=dict)
    assets: tuple[str, ...] = ()


class Written(NamedTuple):
    file: str
    package: Package
    pages: int
    others: int
    html_bytes: int
    file_bytes: int
    sha256: str


PYTHON = Package(
    "python3.11-doc",
    "3.11.2-6+deb12u9",
    "5b3594189d6ef9a6963ce0347fd307a1cc67620ad697e144db366070e2e146be",
    "usr/share/doc/python3.11/html",
    "https://docs.python.org/3.11/",
)
POSTGRESQL = Package(
    "postgresql-doc-15",
    "15.20-0+deb12u1",
    "4c44bf2c599f208b3f46454a6cf7a72e25ec46ff74d37b59dd31ad76b00eebb7",
    "usr/share/doc/postgresql-doc-15/html",
    "https://www.postgresql.org/docs/15/",
)
HANDBOOK = Package(
    "debian-handbook",
    "11.20220922",
    "3d5dbeac1f1afc9c094eab9d0f701f6ecff99c4927d5a4794cf6c85678134faa",
    "usr/share/doc/debian-handbook/html",
    "https://debian-handbook.info/browse/",
)
APACHE = Package(
    "apache2-doc",
    "2.4.71-1~deb12u1",
    "a7b3d1131c1c63dbf9999b28e75f9a133d30f70492b419936bd51759ac77a01f",
    "usr/share/doc/apache2-doc/manual",
    "https://httpd.apache.org/docs/2.4/",
)
ANARCHISM = Package(
    "anarchism",
    "15.3-3",
    "cf21c10948b00e923c62eb31c39a3390413fa26c5ee0e3b925feb0ec7fe42948",
    "usr/share/doc/anarchism/html",
    "https://anarchism.pageabode.com/afaq/",
)
SQLITE = Package(
    "sqlite3-doc",
    "3.40.1-2+deb12u2",
    "466e30d7066e2641fa13e56bc662a2ad521b8cc9c17dde9c9dac3d4f105e32f2",
    "usr/share/doc/sqlite3",
    "https://www.sqlite.org/",
)

# Some servers name the charset and some leave it to the page's <meta>: both happen on the web.
# The assets, there to be skipped, are the documents' own: no logos, nothing under another licence.
SAMPLES = (
    Sample(
        "anarchism.warc.gz",
        ANARCHISM,
        "text/html",
        pages={"append31.html": 1, "contact.html": 1, "sec*.html": 36, "*.html": 10},
    ),
    Sample(
        "apache2-doc.warc.gz",
        APACHE,
        "text/html",
        pages={
            "index.html": 1,
            "en/index.html": 1,
            "en/bind.html": 1,
            "en/*/*.html": 32,
            "en/*.html": 14,
        },
        assets=(
            "images/mod_filter_new.gif",
            "images/syntax_rewritecond.svg",
            "style/css/manual-zip.css",
        ),
    ),
    # no charset in the header: German and Spanish pages are ISO-8859-1, Korean ones EUC-KR, the
    # rest UTF-8
    Sample(
        "apache2-doc-translations.warc.gz",
        APACHE,
        "text/html",
        pages={
            "de/**/*.html": 7,
            "es/**/*.html": 7,
            "fr/**/*.html": 8,
            "ja/**/*.html": 7,
            "ko/**/*.html": 8,
            "tr/**/*.html": 6,
            "pt-br/**/*.html": 3,
            "ru/**/*.html": 2,
            "zh-cn/**/*.html": 4,
        },
        links={"da/**/*.html": 6, "ru/**/*.html": 4},
    ),
    Sample(
        "debian-handbook.warc.gz",
        HANDBOOK,
        "text/html; charset=UTF-8",
        pages={"en-US/index.html": 1, "en-US/sect.acknowledgments.html": 1, "en-US/*.html": 69},
        assets=("en-US/images/netfilter.png",),
    ),
    # Danish, Greek and Croatian are barely translated: near-duplicates of the English pages
    Sample(
        "debian-handbook-translations.warc.gz",
        HANDBOOK,
        "text/html",
        pages={
            "da-DK/*.html": 10,
            "el-GR/*.html": 7,
            "hr-HR/*.html": 4,
            "ar-MA/*.html": 6,
            "de-DE/*.html": 12,
            "es-ES/*.html": 11,
            "fr-FR/*.html": 12,
            "it-IT/*.html": 8,
            "ja-JP/*.html": 9,
            "pt-BR/*.html": 8,
            "ru-RU/*.html": 9,
            "zh-CN/*.html": 9,
        },
    ),
    Sample(
        "postgresql-doc-15.warc.gz",
        POSTGRESQL,
        "text/html; charset=utf-8",
        pages={"bookindex.html": 1, "bug-reporting.html": 1, "tutorial*.html": 14, "*.html": 78},
        assets=("stylesheet.css", "gin.svg"),
    ),
    Sample(
        "python3.11-doc.warc.gz",
        PYTHON,
        "text/html",
        pages={
            "copyright.html": 1,
            "license.html": 1,
            "*.html": 6,
            "tutorial/*.html": 9,
            "faq/*.html": 8,
            "howto/*.html": 11,
            "reference/*.html": 5,
            "using/*.html": 4,
            "whatsnew/*.html": 4,
            "c-api/*.html": 8,
            "library/*.html": 40,
        },
        assets=(
            "_images/pathlib-inheritance.png",
            "_static/copybutton.js",
            "_static/pydoctheme.css",
        ),
    ),
    Sample(
        "sqlite3-doc.warc.gz",
        SQLITE,
        "text/html; charset=utf-8",
        pages={
            "sqlite.html": 1,
            "releaselog/*.html": 16,
            "c3ref/*.html": 10,
            "syntax/*.html": 5,
            "*.html": 44,
        },
        assets=("robots.txt", "images/sw.gif"),
    ),
)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--out", type=Path, default=Path(__file__).parent.parent / "samples")
    parser.add_argument(
        "--debs", type=Path, help="folder of already downloaded .deb files; apt-get otherwise"
    )
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        folders = {}
        for package in dict.fromkeys(sample.package for sample in SAMPLES):
            deb = fetch(package, args.debs or Path(scratch))
            folders[package] = Path(scratch, "unpacked", package.name)
            folders[package].mkdir(parents=True)
            subprocess.run(["dpkg", "-x", deb, folders[package]], check=True)
        print_table([write_sample(sample, folders[sample.package], args.out) for sample in SAMPLES])


def fetch(package: Package, folder: Path) -> Path:
    """The pinned .deb in `folder`, downloaded with apt-get unless it lies there."""
    if not list(folder.glob(f"{package.name}_*.deb")):
        subprocess.run(
            ["apt-get", "download", "-qq", f"{package.name}={package.version}"],
            cwd=folder,
            check=False,
        )
    for deb in folder.glob(f"{package.name}_*.deb"):
        if hashlib.sha256(deb.read_bytes()).hexdigest() == package.sha256:
            return deb
    raise FileNotFoundError(
        f"{package.name} {package.version}: no .deb with sha256 {package.sha256[:12]}… in {folder}; where Debian has "
        f"moved on, take that version from https://snapshot.debian.org/binary/{package.name}/ and pass --debs FOLDER"
    )


def write_sample(sample: Sample, unpacked: Path, out: Path) -> Written:
    root = unpacked / sample.package.root
    pages = choose(root, sample)
    others = [root / asset for asset in sample.assets]
    built = newest_change(unpacked)
    target = out / sample.file
    with target.open("wb") as stream:
        info = warcinfo(sample, built)
        stream.write(member(info))
        for path in sorted(pages + others):
            stream.write(member(response(sample, root, path, built)))
    data = target.read_bytes()
    return Written(
        sample.file,
        sample.package,
        len(pages),
        len(others),
        sum(p.stat().st_size for p in pages),
        len(data),
        hashlib.sha256(data).hexdigest(),
    )


def choose(root: Path, sample: Sample) -> list[Path]:
    """The first pages of each pattern by the hash of the file's name.

    The name without its folder ranks: so a page's translations and its English original are chosen
    together.
    """
    chosen: dict[Path, None] = {}
    for patterns, linked in ((sample.pages, False), (sample.links, True)):
        for pattern, count in patterns.items():
            ranked = sorted(
                candidates(root, pattern, linked=linked), key=lambda path: (rank(path.name), path)
            )
            fresh = [path for path in ranked if path not in chosen][:count]
            if len(fresh) < count:
                raise ValueError(
                    f"{sample.file}: '{pattern}' matches {len(fresh)} pages, wanted {count}"
                )
            chosen |= dict.fromkeys(fresh)
    return list(chosen)


def candidates(root: Path, pattern: str, *, linked: bool) -> Iterator[Path]:
    for path in root.glob(pattern):
        if path.is_symlink() == linked and path.is_file() and path.stat().st_size <= MAX_PAGE_BYTES:
            yield path


def rank(name: str) -> str:
    return hashlib.sha256(name.encode()).hexdigest()


def newest_change(unpacked: Path) -> datetime:
    """The package's build date: Debian clamps every file's time to the last changelog entry."""
    seconds = max(
        path.stat().st_mtime
        for path in unpacked.rglob("*")
        if path.is_file() and not path.is_symlink()
    )
    return datetime.fromtimestamp(int(seconds), UTC)


def warcinfo(sample: Sample, built: datetime) -> bytes:
    package = sample.package
    block = http_head(
        "",
        {
            "software": "gristmill tools/build_samples.py",
            "format": "WARC File Format 1.0",
            "description": f"files of the Debian package {package.name} {package.version} (sha256 {package.sha256}); "
            "bodies are the package's bytes, addresses and HTTP headers are rebuilt, nothing was crawled",
            "license": "see LICENSES.md",
        },
    ).encode()
    return record(
        "warcinfo",
        block,
        built,
        identity=sample.file,
        headers={"WARC-Filename": sample.file, "Content-Type": "application/warc-fields"},
    )


def response(sample: Sample, root: Path, path: Path, built: datetime) -> bytes:
    body = path.read_bytes()
    url = sample.package.base_url + path.relative_to(root).as_posix()
    changed = datetime.fromtimestamp(int(path.stat().st_mtime), UTC)
    head = http_head(
        "HTTP/1.1 200 OK",
        {
            "Date": format_datetime(built, usegmt=True),
            "Last-Modified": format_datetime(changed, usegmt=True),
            "Content-Type": sample.content_type
            if path.suffix == ".html"
            else CONTENT_TYPES[path.suffix],
            "Content-Length": str(len(body)),
        },
    ).encode()
    return record(
        "response",
        head + body,
        built,
        identity=sample.file + " " + url,
        headers={
            "WARC-Target-URI": url,
            "WARC-Payload-Digest": digest(body),
            "Content-Type": "application/http; msgtype=response",
        },
    )


def record(
    kind: str, block: bytes, date: datetime, *, identity: str, headers: Mapping[str, str]
) -> bytes:
    head = http_head(
        "WARC/1.0",
        {
            "WARC-Type": kind,
            "WARC-Record-ID": f"<urn:uuid:{uuid.uuid5(uuid.NAMESPACE_URL, identity)}>",
            "WARC-Date": date.strftime("%Y-%m-%dT%H:%M:%SZ"),
            **headers,
            "WARC-Block-Digest": digest(block),
            "Content-Length": str(len(block)),
        },
    )
    return head.encode() + block + b"\r\n\r\n"


def http_head(first: str, headers: Mapping[str, str]) -> str:
    lines = ([first] if first else []) + [f"{name}: {value}" for name, value in headers.items()]
    return CRLF.join(lines) + CRLF + CRLF


def digest(data: bytes) -> str:
    return "sha1:" + base64.b32encode(hashlib.sha1(data).digest()).decode()


def member(data: bytes) -> bytes:
    """One gzip member; zlib writes the header with time 0, so the bytes depend on the data and zlib
    alone.
    """
    deflate = zlib.compressobj(9, zlib.DEFLATED, 31)
    return deflate.compress(data) + deflate.flush()


def print_table(written: list[Written]) -> None:
    print(
        "| file | pages | other | HTML bytes | file bytes | package | sha256 |\n|---|--:|--:|--:|--:|---|---|"
    )
    for row in written:
        print(
            f"| {row.file} | {row.pages} | {row.others} | {row.html_bytes:,} | {row.file_bytes:,} "
            f"| {row.package.name} {row.package.version} | `{row.sha256}` |"
        )
    print(
        f"| **total** | {sum(r.pages for r in written)} | {sum(r.others for r in written)} "
        f"| {sum(r.html_bytes for r in written):,} | {sum(r.file_bytes for r in written):,} | | |"
    )


if __name__ == "__main__":
    main()
