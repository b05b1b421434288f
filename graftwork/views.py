"""What MLflow's pages show first: a saved view of the candidates, best first, which is a tag of the experiment.

MLflow's own table of runs has no metrics until its reader picks them, and hides the candidates' runs, which are nested, behind a plus sign.
A view that is ordered by anything but time is flat.
"""

import base64
import json
import zlib

KEY = "graftwork-candidates"
TAG = f"mlflow.sharedViewState.{KEY}"
COLUMNS = ("val_accuracy", "test_accuracy", "test_macro_f1", "test_log_loss", "test_ece")
CHARTS = {
    "Epoch by epoch": ("LINE", ("val_accuracy", "val_loss", "train_loss", "learning_rate")),
    "On the test images": ("BAR", ("test_accuracy", "test_macro_f1", "test_log_loss", "test_ece")),
    "The machine": ("LINE", ("images_per_second", "system/cpu_utilization_percentage")),
}


def candidates_view() -> str:
    """Return the tag's value, in the form that MLflow 3's own pages write and read: the state is deflated JSON."""
    sections, charts = [], []
    for section, (kind, metrics) in CHARTS.items():
        sections.append({"uuid": section, "name": section, "display": True, "isReordered": False, "deleted": False})
        for metric in metrics:
            chart = {
                "uuid": metric,
                "type": kind,
                "metricKey": metric,
                "displayName": metric.removeprefix("system/"),
                "metricSectionId": section,
                "runsCountToCompare": 20,
                "deleted": False,
            }
            if kind == "LINE":
                by_time = metric.startswith("system/")
                chart |= {
                    "lineSmoothness": 0,
                    "scaleType": "linear",
                    "xAxisScaleType": "linear",
                    "xAxisKey": "time" if by_time else "step",
                    "useGlobalXaxisKey": not by_time,
                    "useGlobalLineSmoothing": True,
                    "selectedXAxisMetricKey": "",
                    "yAxisKey": "metric",
                    "yAxisExpressions": [],
                    "ignoreOutliers": False,
                    "range": {},
                }
            charts.append(chart)
    run_name, columns = "attributes.`Run Name`", [f"metrics.`{name}`" for name in COLUMNS] + ["tags.`graftwork.run`"]
    state = {
        "searchFilter": "tags.`graftwork.candidate` LIKE '%'",
        "orderByKey": "metrics.`test_accuracy`",
        "orderByAsc": False,
        "startTime": "ALL",
        "lifecycleFilter": "Active",
        "datasetsFilter": [],
        "modelVersionFilter": "All Runs",
        "selectedColumns": columns,
        # A width counts for a column in the order alone; "0" holds the boxes to tick.
        "columnOrder": ["0", run_name, "runDateAndNestInfo", *columns, "duration"],
        "columnWidths": {"0": 80, run_name: 300, columns[-1]: 190},
        "runsHiddenMode": "FIRST_20_RUNS",
        "groupBy": None,
        "groupsExpanded": {},
        "compareRunSections": sections,
        "compareRunCharts": charts,
        "hideEmptyCharts": True,
        "globalLineChartConfig": {"xAxisKey": "step", "lineSmoothness": 0, "selectedXAxisMetricKey": ""},
    }
    packed = base64.b64encode(zlib.compress(json.dumps(state).encode(), 9)).decode()
    return json.dumps({"name": "Candidates", "createdAt": 0, "updatedAt": 0, "state": f"deflate;{packed}"})


def view_link(address: str, experiment_id: str) -> str:
    """Return the page of a server's view."""
    return f"{address.rstrip('/')}/#/experiments/{experiment_id}/runs?workflowType=machine_learning&viewStateShareKey={KEY}"
