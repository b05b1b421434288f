"""The view of the candidates that MLflow's pages open."""

import base64
import json
import zlib

from graftwork.views import CHARTS, COLUMNS, TAG, candidates_view, view_link


def test_the_view_is_what_mlflow_reads() -> None:
    """MLflow drops a view that it cannot read without a word, and its table has no metrics again."""
    view = json.loads(candidates_view())
    method, packed = view["state"].split(";")
    state = json.loads(zlib.decompress(base64.b64decode(packed)))
    assert (view["name"], method) == ("Candidates", "deflate")
    assert not state["orderByKey"].startswith("attributes")  # by time, MLflow hides nested runs behind their parents
    assert set(state["selectedColumns"]) <= set(state["columnOrder"])
    assert {f"metrics.`{name}`" for name in COLUMNS} < set(state["selectedColumns"])
    sections = {section["uuid"] for section in state["compareRunSections"]}
    assert {chart["metricSectionId"] for chart in state["compareRunCharts"]} == sections == set(CHARTS)
    assert len(candidates_view()) < 5000  # the longest tag that MLflow keeps


def test_the_link_names_the_view() -> None:
    """A link to another view would open the table without metrics."""
    link = view_link("http://127.0.0.1:5000/", "7")
    assert link.startswith("http://127.0.0.1:5000/#/experiments/7/runs?")
    assert link.endswith(f"viewStateShareKey={TAG.removeprefix('mlflow.sharedViewState.')}")
