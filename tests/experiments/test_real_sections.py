"""The filter comparison and the attacks on real rows, with a teacher of a few steps."""

from pathlib import Path

import pytest

from reft_ray.experiments.attacks import section as attacks
from reft_ray.experiments.bench.presets import preset
from reft_ray.experiments.bench.workspace import Workspace
from reft_ray.experiments.filters import section as filters

pytestmark = [pytest.mark.slow, pytest.mark.timeout(3600)]


@pytest.fixture(scope="module")
def workspace(shared_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Workspace:
    changes = {"rows": str(shared_data), "teacher_settings": {"epochs": 0.02, "batch_rows": 32}}
    return Workspace(preset("small", changes), tmp_path_factory.mktemp("small"))


def test_baseline_filters_have_their_known_auroc_on_foreign_rows(workspace: Workspace, tmp_path: Path) -> None:
    result = filters.SECTION.run(workspace, {"variants": False})
    foreign = result["parts"]["foreign"]
    assert (foreign["rows"], foreign["harmful"]) == (6150, 1112)
    auroc = {name: row["auroc"][0] for name, row in foreign["filters"].items()}
    assert 0.82 < auroc["TF-IDF + LR"] < 0.89
    assert 0.85 < auroc["MiniLM + LR"] < 0.92
    assert auroc["keywords"] > 0.6
    assert result["benign"]["SST-2"]["rows"] == 872
    assert "| TF-IDF + LR |" in filters.SECTION.render(result, tmp_path)


def test_attacks_on_real_rows_are_screened_and_gated(workspace: Workspace, tmp_path: Path) -> None:
    settings = {
        "task_rows": 60,
        "attack_rows": 20,
        "evaluated": 20,
        "students": ["guided"],
        "student": {"epochs": 1},
        "suffix_steps": 3,
        "suffixes": 2,
        "suffix_shared_by": 3,
    }
    result = attacks.SECTION.run(workspace, settings)
    found = {one["name"]: {finding["name"] for finding in one["findings"]} for one in result["attacks"]}
    assert "identity_prompts" in found["identity shift"]
    assert "refuse_then_comply" in found["refuse, then comply"]
    assert "identity shift" in attacks.SECTION.render(result, tmp_path)
