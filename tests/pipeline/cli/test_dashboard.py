"""`--dashboard` starts Ray's dashboard for the time of a run, and says where it is."""

import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import requests

from pipeline.engine import cluster
from stages.formats.errors import ConfigError
from tests.support.paths import ROOT

TOKEN = "0123456789abcdef" * 4


@pytest.mark.ray
@pytest.mark.kill
def test_the_dashboard_of_a_run_answers_at_the_url_that_is_printed(tmp_path):
    pytest.importorskip("aiohttp_cors", reason="the dashboard comes with the cluster extra")
    rows = [{"text": f"A text about number {n}. " * 20, "url": f"u{n}"} for n in range(3)]
    Path(tmp_path, "in.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    Path(tmp_path, "config.toml").write_text(
        f'run.directory = "{tmp_path}/run"\ninput.paths = ["{tmp_path}/in.jsonl"]\n'
        'input.format = "jsonl"\ninput.url_column = "url"\nextract.filters = []\n'
    )
    env = os.environ | {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": TOKEN, "no_proxy": "127.0.0.1"}
    env.pop("RAY_ADDRESS", None)
    words = ["-m", "pipeline", "run", f"{tmp_path}/config.toml", "--only", "extract", "--dashboard"]
    run = subprocess.Popen(
        [sys.executable, *words], cwd=ROOT, env=env, stderr=subprocess.PIPE, text=True
    )
    line = run.stderr.readline()
    url = re.match(r"dashboard (http://127\.0\.0\.1:\d+) ", line)[1]
    run.send_signal(signal.SIGSTOP)  # or it may end first
    page = requests.get(url, timeout=60)
    version = requests.get(
        f"{url}/api/version", timeout=60, headers={"Authorization": f"Bearer {TOKEN}"}
    )
    refused = requests.get(f"{url}/api/version", timeout=60)
    assert "Ray Dashboard" in page.text
    assert "ray_version" in version.json() and refused.status_code == 401
    run.send_signal(signal.SIGCONT)
    assert run.wait(300) == 0, run.stderr.read()
    with pytest.raises(requests.ConnectionError):
        requests.get(url, timeout=60)


def test_a_dashboard_without_its_packages_says_what_to_install(monkeypatch):
    monkeypatch.setattr(cluster, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"pip install .*\[cluster\]"):
        cluster.local_settings(dashboard=True)
