"""Secrets: what is one, what documentation shows in its place, private keys whole and cut, GitHub's
checksum.
"""

import base64
import json
import random
import re
import string

import pytest
from hypothesis import given
from hypothesis import strategies as st

from filters.pii import secrets
from filters.pii.scrub import Pii

BASE62 = string.digits + string.ascii_letters
HEX = "0123456789abcdef"
BASE64URL = BASE62 + "-_"


def rolled(letters: str, length: int, *, seed: int = 0) -> str:
    return "".join(random.Random(f"{letters}{length}{seed}").choices(letters, k=length))


def jwt(header: dict[str, str], *, claims: str = rolled(BASE64URL, 40)) -> str:
    head = base64.urlsafe_b64encode(json.dumps(header).encode()).decode().rstrip("=")
    return f"{head}.{claims}.{rolled(BASE64URL, 43)}"


# assembled here, so that no scanner of repositories takes them for real ones
KEYS = [
    "AKIA" + rolled(string.ascii_uppercase + "234567", 16),
    "ASIA" + rolled(string.ascii_uppercase + "234567", 16, seed=1),
    "ghp_" + rolled(BASE62, 36),
    "github_pat_" + rolled(BASE62, 22) + "_" + rolled(BASE62, 59),
    "glpat-" + rolled(BASE62, 20),
    "xoxb-"
    + rolled(string.digits, 12)
    + "-"
    + rolled(string.digits, 12)
    + "-"
    + rolled(BASE62, 24),
    "https://hooks.slack.com/services/T" + "0A1B2C3D4/B" + "4D3C2B1A0/" + rolled(BASE62, 24),
    "sk_live_" + rolled(BASE62, 24),
    "rk_live_" + rolled(BASE62, 99),
    "AIza" + rolled(BASE64URL, 35, seed=1),
    "sk-" + rolled(BASE62, 20) + "T3Blbk" + "FJ" + rolled(BASE62, 20),
    "sk-" + rolled(HEX, 32),  # DeepSeek
    "sk-proj-" + rolled(BASE64URL, 120),
    "sk-ant-api03-" + rolled(BASE64URL, 93) + "AA",
    "hf_" + rolled(string.ascii_letters, 34),
    "npm_" + rolled(BASE62, 36, seed=2),
    "pypi-AgEIcHlwaS5vcmc" + rolled(BASE64URL, 150),
    "SG." + rolled(BASE64URL, 22) + "." + rolled(BASE64URL, 43),
    "SK" + rolled(HEX, 32),
    "123456789:AA" + rolled(BASE64URL, 33),
    "dop_v1_" + rolled(HEX, 64),
    "AccountKey=" + rolled(BASE62 + "+/", 86) + "==",
    "bot123456789:AA" + rolled(BASE64URL, 33, seed=1),
    jwt({"alg": "HS256", "typ": "JWT"}),
]
SHOWN = [
    "AKIAIOSFODNN7EXAMPLE",
    "aws_secret_access_key = wJalrXUtnFEMI/K7MDENG/bPxRfiCYEXAMPLEKEY",
    "sk_live_xxxxxxxxxxxxxxxxxxxxxxxx, sk_live_YOUR_API_KEY and YOUR_API_KEY",
    "ghp_abcdefghijklmnopqrstuvwxyz0123456789",
    "ghp_" + "1" * 36,
    "AIzaSyYourKeyHere" + "a" * 22,
    "the-task-of-finding-sk-in-words-is-not-an-easy-one-at-all-my-friend",
    "sk-learn-pipelines-with-many-many-steps-in-each-of-them-v2",
    "sk-0123456789abcdef0123456789abcdef",
    "commit 9fceb02d0ae598e95dc970b74767f19372d61af8",
    "eyJhbGciOiJIUzI1NiIsInR5cCI6IkpXVCJ9.eyJzdWIiOiIxMjM0NTY3ODkwIiwibmFtZSI6IkpvaG4gRG9lIn0.SflKxwRJSMeKKF2QT4fwpMeJf36POk6yJV_adQssw5c",
    jwt({"typ": "picture"}),
    "eyJ" + rolled(BASE62, 30) + "." + rolled(BASE62, 30) + "." + rolled(BASE62, 30),
    "-----BEGIN PRIVATE KEY-----\n...\n-----END PRIVATE KEY-----",
    "-----BEGIN RSA PRIVATE KEY-----\nMIIEpAIBAAKCAQEA\n... and so on, until you come to\n-----END RSA PRIVATE KEY-----",
    "-----BEGIN CERTIFICATE-----\n" + rolled(BASE62, 64) + "\n-----END CERTIFICATE-----",
]
LINES = [rolled(BASE62 + "+/", 64, seed=i) for i in range(12)] + [rolled(BASE62, 9) + "="]


@pytest.mark.parametrize("key", KEYS)
@pytest.mark.parametrize(
    "around", ["{}", "export KEY='{}'; run\nx", '{{"key": "{}"}}', "ключ {}.", "密钥是{}的"]
)
def test_a_key_is_found_from_its_first_letter_to_its_last(key: str, around: str) -> None:
    text = around.format(key)
    [(start, end)] = secrets.find_secrets(text)
    assert text[start:end] == key.removeprefix("https://")


@pytest.mark.parametrize("text", SHOWN)
def test_examples_in_documentation_stay(text: str) -> None:
    assert secrets.find_secrets(text) == []


def test_a_part_of_something_longer_is_no_key() -> None:
    assert secrets.find_secrets("iVBORw0KGgo" + KEYS[0] + "AAAANSUhEUg") == []


def test_the_secret_half_goes_with_an_aws_key_and_by_its_name() -> None:
    half = rolled(BASE62 + "/+", 40)
    assert Pii().scrub(f"id={KEYS[0]}\nkey={half}\n").text == "id=<SECRET>\nkey=<SECRET>\n"
    assert Pii().scrub(f"AWS_SECRET_ACCESS_KEY='{half}'").text == "AWS_SECRET_ACCESS_KEY='<SECRET>'"
    assert secrets.find_secrets(f"sha1 of the file, in some form: {half}") == []


@pytest.mark.parametrize(
    "name",
    [
        "aws_secret=",
        "AWS_SECRET_KEY = ",
        "awsSecretKey: '",
        'secretAccessKey": "',
        "SECRET_ACCESS_KEY is ",
    ],
)
def test_an_aws_secret_is_known_by_each_of_its_names(name: str) -> None:
    half = rolled(BASE62 + "/+", 40)
    assert [("x " + name + half)[a:b] for a, b in secrets.find_secrets("x " + name + half)] == [
        half
    ]
    assert secrets.find_secrets("x " + name.replace("s", "z").replace("S", "Z") + half) == []


def test_githubs_checksum_is_checked_as_github_documents_it() -> None:
    real = "zQWBuTSOoRi4A9spHcVY5ncnsDkxkJ" + "0mLq17"  # a revoked token from npm's documentation
    assert secrets.has_checksum(real)
    assert not any(
        secrets.has_checksum(real[:i] + "x" + real[i + 1 :])
        for i in range(len(real))
        if real[i] != "x"
    )


def begin(kind: str = "RSA ") -> str:
    return f"-----BEGIN {kind}PRIVATE KEY-----"


def end(kind: str = "RSA ") -> str:
    return f"-----END {kind}PRIVATE KEY-----"


@pytest.mark.parametrize(
    "block",
    [
        "\n".join([begin(), *LINES, end()]),
        "\n".join([begin("OPENSSH "), *LINES, end("OPENSSH ")]),
        "\n".join(
            [begin(), "Proc-Type: 4,ENCRYPTED", "DEK-Info: AES-128-CBC,6BA3", "", *LINES, end()]
        ),
        " ".join([begin(""), *LINES, end("")]),
        "\\n".join([begin(""), *LINES, end("")]),
        "\n    ".join([begin("EC "), *LINES, end("EC ")]),
        "\n> ".join([begin("EC "), *LINES, end("EC ")]),
        "\n# ".join([begin("EC "), *LINES, end("EC ")]),
        "\n// ".join([begin("EC "), *LINES, end("EC ")]),
        "\n * ".join([begin("EC "), *LINES, end("EC ")]),
        "<br>\n".join([begin("EC "), *LINES, end("EC ")]),
        "<br />".join([begin("EC "), *LINES, end("EC ")]),
        "".join(
            [begin("EC "), *(f"\n{i:3} {line}" for i, line in enumerate([*LINES, end("EC ")], 2))]
        ),
        "\n// ".join([*LINES, end("EC ")]),
        "<br>\n".join([*LINES, end("EC ")]),
        LINES[0] + "".join(f"\n{i}: {line}" for i, line in enumerate([*LINES[1:], end("EC ")], 2)),
        "\r\n".join([begin(), *LINES[:1], end()]),
        "\n".join([begin(), *LINES[:-1]]),
        "\n".join([*LINES, end()]),
    ],
)
def test_a_private_key_is_one_secret_whole_or_cut(block: str) -> None:
    scrubbed = Pii().scrub(f"my key is\n{block}\nand this is my mail: a@b.org")
    assert scrubbed.text == "my key is\n<SECRET>\nand this is my mail: <EMAIL_ADDRESS>"
    assert [span.entity for span in scrubbed.spans] == ["SECRET", "EMAIL_ADDRESS"]
    assert [scrubbed.text[s.start : s.end] for s in scrubbed.spans] == [
        "<SECRET>",
        "<EMAIL_ADDRESS>",
    ]


def test_prose_after_a_cut_key_stays() -> None:
    text = "\n".join([begin(), *LINES[:3], "internationalization of the text that follows"])
    assert Pii().scrub(text).text == "<SECRET>\ninternationalization of the text that follows"


@pytest.mark.parametrize(
    "text",
    [
        "A" * 60_000,
        "eyJ" * 30_000,
        (begin() + "\n") * 3_000,
        ("Ab1/" * 16 + "\n") * 2_000,
        end() * 3_000,
        "// 1 <br>" * 8_000,
    ],
)
def test_no_text_takes_more_than_linear_time(text: str) -> None:
    # exponential or quadratic: hours or minutes
    assert Pii(entities=("SECRET",)).scrub(begin() + "\n" + text + end()).text != ""


BITS = st.one_of(
    st.sampled_from(
        [
            *KEYS,
            *SHOWN,
            *LINES,
            begin(),
            end(),
            "\\n",
            "\n",
            "secret_access_key=",
            "a@b.org",
            "<SECRET>",
            "\ud800",
        ]
    ),
    st.text("AKIAeyJ-._=+/ \n\\09azAZ", max_size=20),
)


TEXTS = st.lists(BITS, max_size=12).flatmap(
    lambda bits: st.sampled_from(["", " ", "\n"]).map(lambda sep: sep.join(bits))
)


@given(TEXTS)
def test_signs_include_the_prefix_of_every_key(text: str) -> None:
    assert {prefix for prefix, form in secrets._KEYS if form.search(text)} <= secrets._signs(text)


@given(TEXTS)
def test_scrubbing_twice_changes_nothing(text: str) -> None:
    pii = Pii(entities=("SECRET", "EMAIL_ADDRESS", "CRYPTO"))
    once = pii.scrub(text)
    assert pii.scrub(once.text) == (once.text, [])
    assert all(re.fullmatch("<[A-Z_]+>", once.text[s.start : s.end]) for s in once.spans)
