"""docs/cost.md: what it says follows from the measured figures and the inputs beside it."""

import pytest

from benchmarks import cost_page
from benchmarks.snapshot import (
    figures,
    inputs,
    names_step,
    reading_floor,
    snapshot_steps,
    stored_bytes,
)

RECIPES = ("web", "web_models", "trafilatura")


def core_hours(given, recipe="web"):
    return sum(step.core_hours for step in snapshot_steps(figures(), given, recipe))


def test_the_page_is_what_make_cost_renders():
    assert cost_page.PAGE.read_text() == cost_page.render(), "run `make cost`"


@pytest.mark.parametrize("recipe", RECIPES)
def test_steps_of_the_measured_pages_add_up_to_the_measured_stages(recipe):
    """A snapshot that is the measured pages themselves costs what was measured."""
    measured = figures()
    recipes, of = measured["recipes"], measured["recipes"][recipe]
    web = recipes["web"]
    characters = of["characters"] / of["documents"] * of["documents_refined"]
    given = inputs()
    given = given._replace(
        snapshot=given.snapshot
        | {
            "pages": recipes["pages"],
            "payload_bytes_per_page": recipes["payload_bytes"] / recipes["pages"],
            "extracted_share": web["pages_extracted"] / recipes["pages"],
            "tokens": of["tokens"],
            "tokens_per_document": of["tokens"] / of["documents_refined"],
            "kept_by_dedup": of["documents_refined"] / web["documents"],
            "characters_per_token": characters / of["tokens"],
        }
    )
    stages = {}
    for step in snapshot_steps(measured, given, recipe):
        stages[step.stage] = stages.get(step.stage, 0) + step.seconds * step.items
    extract = "web" if recipe == "web_models" else recipe  # the same stage, measured twice
    assert stages["extract"] == pytest.approx(recipes[extract]["seconds"]["extract"])
    for stage in ("refine", "pack"):
        assert stages[stage] == pytest.approx(of["seconds"][stage])


def test_more_work_costs_more():
    given = inputs()
    base = core_hours(given)
    for name in ("pages", "payload_bytes_per_page", "extracted_share", "tokens"):
        more = given._replace(snapshot=given.snapshot | {name: given.snapshot[name] * 1.5})
        assert core_hours(more) > base
    assert core_hours(given.scaled(0.5)) == pytest.approx(base / 2)
    assert 0 < reading_floor(figures(), given) < base < core_hours(given, "trafilatura")
    assert names_step(figures(), given).core_hours > 0
    assert min(stored_bytes(figures(), given)) > 0


def test_a_core_hour_is_a_share_of_a_machine():
    given = inputs()
    price = given.prices["node_spot"] / given.prices["node_processors"]
    assert given.core_hour["spot"] == pytest.approx(price / given.prices["processor_speed"])
    slower = given._replace(prices=given.prices | {"processor_speed": 0.5})
    assert slower.core_hour["spot"] == pytest.approx(2 * price)


@pytest.mark.parametrize(
    "value, text",
    [
        (2.64e9, "2.64 billion"),
        (156e9, "156 billion"),
        (5e-6, "5e-06"),
        (671, "671"),
        (1234.5, "1,234"),
        (1.5, "1.5"),
    ],
)
def test_numbers_read_well(value, text):
    assert cost_page.big(value) == text
